"""Asking the run of a job to end, through its output folder: that works wherever the run is.

Whoever runs the job looks for a request every few seconds. A request is for the run that is under
way when it is written: the next run takes it away before it begins.
"""

from __future__ import annotations

import json
import time
from typing import Literal

from eevp_batch.errors import UsageError
from eevp_batch.storage import layout
from eevp_batch.storage.store import Store

Ending = Literal["drain", "now"]


def ask_to_end(store: Store, drains: bool) -> None:
    """Ask the run that is under way to end.

    Args:
        store: the job's output folder.
        drains: whether it finishes what it has begun first.

    Raises:
        UsageError: no run is under way.
    """
    if not store.is_locked(layout.LOCK):
        raise UsageError(f"{store.text}: no run of this job is under way")
    request = {"unix_s": round(time.time(), 3), "drains": drains}
    store.write(layout.CANCEL, json.dumps(request).encode())


def asked_to_end(store: Store) -> Ending | None:
    """How the run that is under way was asked to end; None if nobody asked.

    Raises:
        OSError: storage cannot say.
    """
    if not store.exists(layout.CANCEL):
        return None
    try:
        drains = json.loads(store.read(layout.CANCEL)).get("drains")
    except (ValueError, AttributeError, FileNotFoundError):
        return None  # no request of ours
    return "now" if drains is False else "drain"


def forget_request(store: Store) -> None:
    """Take away a request that was for an earlier run."""
    store.delete(layout.CANCEL, missing_ok=True)
