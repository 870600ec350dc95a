"""What the files of an output folder are called in the names of points."""

from __future__ import annotations

import re

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")
_LABELS = [
    (r"data/part-\d+\.parquet", "data part"),
    (r"errors/part-\d+\.parquet", "errors part"),
    (r"_eevp/commits/\d+\.json", "commit record"),
    (r"_eevp/attempts/learned\..*", "attempt of learned exits"),
    (r"_eevp/attempts/.*\.errors\.parquet", "attempt errors"),
    (r"_eevp/attempts/.*\.parquet", "attempt data"),
    (r"_eevp/learned/.*", "learned exits"),
    (r"_eevp/learned\.json", "learned record"),
    (r"_eevp/exits_stopped\.json", "exits stopped"),
    (r"_eevp/plan\.json", "plan"),
    (r"_eevp/job\.resolved\.yaml", "resolved job"),
    (r"_eevp/events\.jsonl", "events"),
    (r"_eevp/lock", "lock"),
    (r"_eevp/lock\.d/\d+\.json", "lock holder"),
    (r"_eevp/set_aside/.*\.json", "record set aside"),
    (r"_SUCCESS", "_SUCCESS"),
]


def label(rel: str) -> str:
    """The kind of a file or folder, by its name relative to the output folder."""
    folder, slash, name = rel.rpartition("/")
    temporary = _TEMPORARY.fullmatch(name)
    if temporary:
        return f"temporary {label(folder + slash + temporary[1])}"
    for pattern, text in _LABELS:
        if re.fullmatch(pattern, rel):
            return text
    return f"folder {rel or '.'}"
