"""Input files that were sent along with a job: kept in its output folder, which all nodes see.

Their names hold a hash of their content, so that a file is never replaced by another one, and a
job that is submitted again finds the same names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from eevp_batch.storage import layout
from eevp_batch.storage.links import refuse_links
from eevp_batch.storage.location import join
from eevp_batch.storage.store import Store

_HASH_DIGITS = 16
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def sent_name(path: Path) -> str:
    """The name under which a file is sent: its hash, then its own name as far as it is plain."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{digest[:_HASH_DIGITS]}-{_UNSAFE.sub('_', path.name)[-80:]}"


def sent_path(out: str, name: str) -> str:
    """Where a sent file will be.

    Args:
        out: the job's output folder or URI.
        name: what `sent_name` gave.
    """
    return join(out, f"{layout.INPUTS_DIR}/{name}")


def take_in(store: Store, folder: Path) -> None:
    """Copy the files of a folder into the output folder, those that are there already left alone.

    Args:
        store: the job's output folder.
        folder: holds files named by `sent_name`.

    Raises:
        UsageError: a link leads out of the output folder.
    """
    refuse_links(store)
    for path in sorted(folder.iterdir()):
        rel = f"{layout.INPUTS_DIR}/{path.name}"
        if not store.exists(rel) or store.size(rel) != path.stat().st_size:
            store.write(rel, path.read_bytes())
