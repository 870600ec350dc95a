"""Links in an output folder: whoever made them would decide what is overwritten elsewhere."""

from __future__ import annotations

import os

from eevp_batch.errors import UsageError
from eevp_batch.storage import layout
from eevp_batch.storage.local_store import LocalStore
from eevp_batch.storage.store import Store

_WRITTEN = (
    layout.META_DIR,
    layout.DATA_DIR,
    layout.ERRORS_DIR,
    layout.COMMITS_DIR,
    layout.ATTEMPTS_DIR,
    layout.LEARNED_DIR,
    layout.INPUTS_DIR,
    layout.CANCEL,
    layout.PLAN,
    layout.RESOLVED_SPEC,
    layout.EVENTS,
    layout.LOCK,
)


def refuse_links(store: Store) -> None:
    """Refuse a local output folder in which a link leads out of it.

    The folder itself may be a link, for the user named it.

    Raises:
        UsageError: names the link.
    """
    if not isinstance(store, LocalStore):
        return
    inside = os.path.realpath(store.root) + os.sep
    for rel in _WRITTEN:
        path = store.path(rel)
        target = os.path.realpath(path)
        if os.path.islink(path) and not target.startswith(inside):
            raise UsageError(
                f"{store.text}: found {rel} to be a link to {target}; allowed: folders and files "
                "of its own"
            )
