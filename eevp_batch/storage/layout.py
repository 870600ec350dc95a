"""The names of everything under an output folder."""

from __future__ import annotations

import re

PLAN = "_eevp/plan.json"
RESOLVED_SPEC = "_eevp/job.resolved.yaml"
EVENTS = "_eevp/events.jsonl"
LOCK = "_eevp/lock"
CANCEL = "_eevp/cancel.json"
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
INPUTS_DIR = "_eevp/inputs"
SET_ASIDE_DIR = "_eevp/set_aside"

_PATCH = r"(?:\.r([1-9]\d*))?"
_RECORD_NAME = re.compile(rf"(\d{{5,}}){_PATCH}\.json")
_PART_NAME = re.compile(rf"part-(\d{{5,}}){_PATCH}\.parquet")


def chunk_name(chunk_id: int) -> str:
    """The zero-padded id that names a chunk's files."""
    return f"{chunk_id:05d}"


def data_part(chunk_id: int, patch: int = 0) -> str:
    """Where a chunk's generations are published; `patch` counts the retries of its error rows."""
    return f"{DATA_DIR}/part-{chunk_name(chunk_id)}{_patch_name(patch)}.parquet"


def errors_part(chunk_id: int, patch: int = 0) -> str:
    """Where a chunk's error rows are published."""
    return f"{ERRORS_DIR}/part-{chunk_name(chunk_id)}{_patch_name(patch)}.parquet"


def commit_record(chunk_id: int, patch: int = 0) -> str:
    """The file whose existence commits a chunk, or a patch of it."""
    return f"{COMMITS_DIR}/{chunk_name(chunk_id)}{_patch_name(patch)}.json"


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


def record_key(name: str) -> tuple[int, int] | None:
    """Chunk and patch that a file in the commits folder records; None for any other file."""
    return _key(_RECORD_NAME, name)


def part_key(name: str) -> tuple[int, int] | None:
    """Chunk and patch of a file in the data or errors folder; None for any other file."""
    return _key(_PART_NAME, name)


def record_chunk_id(name: str) -> int | None:
    """The chunk that a file in the commits folder commits; None for a patch or any other file."""
    return _chunk_id(record_key(name))


def part_chunk_id(name: str) -> int | None:
    """The chunk whose own part a file is; None for a patch's or any other file."""
    return _chunk_id(part_key(name))


def _chunk_id(key: tuple[int, int] | None) -> int | None:
    return key[0] if key and not key[1] else None


def _key(pattern: re.Pattern[str], name: str) -> tuple[int, int] | None:
    match = pattern.fullmatch(name)
    if match is None or chunk_name(int(match[1])) != match[1]:
        return None
    return int(match[1]), int(match[2] or 0)


def _patch_name(patch: int) -> str:
    return f".r{patch}" if patch else ""
