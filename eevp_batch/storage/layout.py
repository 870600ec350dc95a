"""The names of everything under an output folder."""

from __future__ import annotations

import re

PLAN = "_eevp/plan.json"
RESOLVED_SPEC = "_eevp/job.resolved.yaml"
EVENTS = "_eevp/events.jsonl"
LOCK = "_eevp/lock"
EXITS_STOPPED = "_eevp/exits_stopped.json"
LEARNED = "_eevp/learned.json"
SUCCESS = "_SUCCESS"
REPORT = "report.html"
CARD = "README.md"

META_DIR = "_eevp"
DATA_DIR = "data"
ERRORS_DIR = "errors"
COMMITS_DIR = "_eevp/commits"
ATTEMPTS_DIR = "_eevp/attempts"
LEARNED_DIR = "_eevp/learned"

_RECORD_NAME = re.compile(r"(\d{5,})\.json")
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


def chunk_name(chunk_id: int) -> str:
    """The zero-padded id that names a chunk's files."""
    return f"{chunk_id:05d}"


def data_part(chunk_id: int) -> str:
    """Where a chunk's generations are published."""
    return f"{DATA_DIR}/part-{chunk_name(chunk_id)}.parquet"


def errors_part(chunk_id: int) -> str:
    """Where a chunk's error rows are published."""
    return f"{ERRORS_DIR}/part-{chunk_name(chunk_id)}.parquet"


def commit_record(chunk_id: int) -> str:
    """The file whose existence commits a chunk."""
    return f"{COMMITS_DIR}/{chunk_name(chunk_id)}.json"


def attempt_data(chunk_id: int, epoch: int, token: str) -> str:
    """Where a replica writes the generations of one lease of a chunk."""
    return f"{ATTEMPTS_DIR}/{chunk_name(chunk_id)}.e{epoch}.{token}.parquet"


def attempt_errors(chunk_id: int, epoch: int, token: str) -> str:
    """Where a replica writes the error rows of one lease of a chunk."""
    return f"{ATTEMPTS_DIR}/{chunk_name(chunk_id)}.e{epoch}.{token}.errors.parquet"


def attempt_learned(token: str, name: str) -> str:
    """Where a replica writes a file of the exits that it has learned."""
    return f"{ATTEMPTS_DIR}/learned.{token}.{name}"


def learned_file(name: str) -> str:
    """Where a file of learned exits is published."""
    return f"{LEARNED_DIR}/{name}"


def record_chunk_id(name: str) -> int | None:
    """The chunk that a file in the commits folder records; None for any other file."""
    return _chunk_id(_RECORD_NAME, name)


def part_chunk_id(name: str) -> int | None:
    """The chunk that a file in the data or errors folder belongs to; None for any other file."""
    return _chunk_id(_PART_NAME, name)


def _chunk_id(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    if match is None or chunk_name(int(match[1])) != match[1]:
        return None
    return int(match[1])
