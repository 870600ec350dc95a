"""Ends what a killed driver leaves behind. Started as a script of its own; imports nothing of ours.

Ray ties the life of its server processes to the driver's, but some of what those start (agents,
the dashboard's helpers) outlives a SIGKILL for minutes or for ever, and the session's folder stays.
The guard holds the reading end of a pipe whose other end only the driver has: end of file means
that the driver is gone, however it ended. It then gives the processes that carry the session's
marker in their environment a moment to end, kills those that have not, and removes the folder.

Usage: guard.py MARKER FOLDER   (MARKER is NAME=VALUE)
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 3.0
_POLL_S = 0.1


def marked_processes(marker: str) -> Iterator[int]:
    """Ids of the living processes of this user whose environment holds `marker`; needs /proc."""
    wanted = marker.encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # It has ended meanwhile, or is not ours to read.
        if wanted in environment.split(b"\0") and int(folder.name) != os.getpid():
            yield int(folder.name)


def sweep(marker: str, grace_s: float = GRACE_S) -> int:
    """Wait for the marked processes to end, kill those that do not; how many were killed."""
    deadline_s = time.monotonic() + grace_s
    while time.monotonic() < deadline_s:
        if not any(marked_processes(marker)):
            return 0
        time.sleep(_POLL_S)
    killed: set[int] = set()
    while left := set(marked_processes(marker)):
        for pid in left - killed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed |= left
        time.sleep(_POLL_S)
    return len(killed)


def main(marker: str, folder: str) -> None:
    """Wait for the driver's end, then sweep and remove the folder."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        continue
    sweep(marker)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
