"""A job's output as any user would read it: pyarrow and json, and nothing of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]

# The columns that the product writes itself, with the types that its users may rely on.
LEADING: dict[str, Any] = {"row_id": pa.string(), "sample_index": pa.int32()}
GENERATED: dict[str, Any] = {
    "prompt_tokens": pa.int32(),
    "generated_tokens": pa.int32(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "exit_layers": pa.list_(pa.uint16()),
    "exit_confidences": pa.list_(pa.float32()),
    "mean_exit_layer": pa.float32(),
    "layers_skipped_fraction": pa.float32(),
    "seed": pa.uint64(),
    "chunk_id": pa.int32(),
    "attempt": pa.int32(),
}
ERRORS: dict[str, Any] = {
    "row_id": pa.string(),
    "error_class": pa.string(),
    "message": pa.string(),
    "attempts": pa.int32(),
    "chunk_id": pa.int32(),
}


def parts(out: Path, folder: str = "data") -> list[Path]:
    """The published files of `data` or `errors`, in chunk order."""
    return sorted((out / folder).glob("part-*.parquet"))


def read_rows(out: Path, folder: str = "data") -> Rows:
    """Every row of `data` or `errors`, chunk by chunk."""
    return [row for part in parts(out, folder) for row in pq.read_table(part).to_pylist()]


def columns(part: Path) -> dict[str, Any]:
    """Type by column name, in the file's order."""
    return {field.name: field.type for field in pq.read_schema(part)}


def metadata(part: Path) -> dict[str, str]:
    """What a file's footer says of its job, keys without their `eevp.`."""
    found = pq.read_schema(part).metadata or {}
    pairs = ((key.decode(), value.decode()) for key, value in found.items())
    return {key.removeprefix("eevp."): value for key, value in pairs if key.startswith("eevp.")}


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of the event log, of one kind or all; empty before the log begins."""
    path = out / "_eevp" / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    # The last line may be under way; what is written ends with a line break.
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def leased_again(out: Path) -> set[int]:
    """Chunks that were leased a second time because the first lease came to nothing.

    Copies of the last chunks do not count: whether there are any depends on how long things take.
    """
    leases = [event for event in events(out, "chunk_leased") if "is_copy" not in event]
    return {event["chunk_id"] for event in leases if event["attempt"] == 2}


def committed_parts(out: Path) -> dict[str, int]:
    """Modification times, in nanoseconds, of the data parts that a commit record vouches for."""
    names = [path.stem for path in (out / "_eevp" / "commits").glob("*.json")]
    return {name: (out / "data" / f"part-{name}.parquet").stat().st_mtime_ns for name in names}
