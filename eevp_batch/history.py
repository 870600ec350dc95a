"""What was submitted from this machine, one JSON object a line: a run's id finds its output.

It is a convenience: it may be deleted, and where it cannot be written nothing else changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_MOST_LINES = 10_000


@dataclass(frozen=True, slots=True)
class Submission:
    """One `submit`.

    Attributes:
        out: output folder or URI.
        address: of the cluster, as the job named it; None for a Ray of its own.
        submission_id: what the cluster's job server calls it; None where there was none.
        unix_s: when.
    """

    run_id: str
    name: str
    out: str
    address: str | None
    submission_id: str | None
    unix_s: float


def remember(
    run_id: str, name: str, out: str, address: str | None = None, submission_id: str | None = None
) -> None:
    """Add a submission.

    Args:
        run_id: of the run.
        name: of the job.
        out: output folder or URI.
        address: see `Submission`.
        submission_id: see `Submission`.
    """
    entry = Submission(run_id, name, out, address, submission_id, round(time.time(), 3))
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        with open(_path(), "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")  # one write: lines do not mix


def recall() -> list[Submission]:
    """What was submitted, oldest first, each run as it was submitted last."""
    found: dict[str, Submission] = {}
    with contextlib.suppress(OSError), open(_path(), encoding="utf-8", errors="replace") as file:
        for line in file.readlines()[-_MOST_LINES:]:
            with contextlib.suppress(ValueError, TypeError):
                entry = Submission(**json.loads(line))
                found.pop(entry.run_id, None)
                found[entry.run_id] = entry
    return list(found.values())


def _path() -> Path:
    """In the folder for what programs remember (the XDG base directories)."""
    named = os.environ.get("XDG_STATE_HOME")
    folder = Path(named) if named else Path.home() / ".local" / "state"
    return folder / "eevp-batch" / "runs.jsonl"
