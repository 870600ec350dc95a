"""The one pass over all ids that plans a job: check each file and id, cut the rows into chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from eevp_batch.errors import InputError
from eevp_batch.records import RowId
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.ids import RepeatedKeys, id_keys, ids_digest
from eevp_batch.storage.inputs import UNREADABLE, InputParquet
from eevp_batch.storage.schema import (
    IdType,
    check_columns,
    check_kept_types,
    kept_columns,
)

_BATCH_ROWS = 1 << 10
MAX_ID_BYTES = 64 << 10
"""Longest id: it is copied into every message and every part that names its row."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file that gives rows.

    Attributes:
        path: absolute local path or URI.
        num_rows: rows in the file, also where `input.limit` uses fewer.
        footer_hash: hex sha256 of its Parquet footer.
    """

    path: str
    num_rows: int
    footer_hash: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive rows of one input file: what is leased, retried and committed.

    Attributes:
        chunk_id: 0.. in input order.
        file_index: index into `Plan.files`.
        row_start: first row in the file.
        id_digest: `ids_digest` of its row ids.
    """

    chunk_id: int
    file_index: int
    row_start: int
    num_rows: int
    id_digest: str

    @property
    def name(self) -> str:
        """The zero-padded id that names its files."""
        return layout.chunk_name(self.chunk_id)


@dataclass
class Scan:
    """What the pass found."""

    id_type: IdType
    kept_columns: list[str]
    files: list[InputFile] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


def scan(paths: Sequence[str], spec: JobSpec) -> Scan:
    """Read the ids of every file once and cut chunks; a chunk never spans two files.

    Files past `input.limit` are not opened.

    Raises:
        InputError: a file, column, type or id cannot be used, or there is no row at all.
    """
    first = InputParquet.open(paths[0])
    found = Scan(check_columns(first.text, first.schema, spec), kept_columns(first.schema, spec))
    rows_left = spec.input.limit
    with RepeatedKeys() as keys:
        for path in paths:
            if rows_left == 0:
                break
            file = InputParquet.open(path)
            _check_file(file, first, found.id_type, spec)
            num_rows = file.num_rows if rows_left is None else min(file.num_rows, rows_left)
            rows_left = None if rows_left is None else rows_left - num_rows
            _cut(found, file, num_rows, keys, spec)
        for suspects in keys.repeated():
            _refuse_repeated(found, suspects, spec)
    if not found.chunks:
        raise InputError(paths[0], "input.path", "no rows in any file", "at least one row")
    return found


def iter_ids(
    file: InputParquet, id_column: str, id_type: IdType, start: int, stop: int
) -> Iterator[list[RowId]]:
    """The ids of rows `start` to `stop`, batch by batch.

    Raises:
        InputError: an id is null, not UTF-8, too long, or does not fit 64 signed bits; or the
            file cannot be read.
    """
    row = start
    try:
        for batch in file.batches([id_column], start, stop, _BATCH_ROWS):
            ids = plain_ids(batch.column(0), id_type, file.text, row)
            row += len(ids)
            yield ids
    except UNREADABLE as error:
        found = f"pages that cannot be read: {error}"
        raise InputError(file.text, "input.path", found, "a readable Parquet file") from error


def plain_ids(column: Any, id_type: IdType, file: str, row_start: int) -> list[RowId]:
    """A column of ids as Python values.

    Raises:
        InputError: an id is null, not UTF-8, or does not fit 64 signed bits.
    """
    allowed = "string ids" if id_type == "string" else "ids of at most 64 signed bits"
    try:
        plain = column.cast(pa.string() if id_type == "string" else pa.int64())
        ids: list[RowId] = plain.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        found = f"an id from row {row_start} on that cannot be read: {error}"
        raise InputError(file, "input.id_column", found, allowed) from error
    if column.null_count:
        row = row_start + ids.index(None)  # type: ignore[arg-type]
        raise InputError(file, "input.id_column", f"a null id in row {row}", "an id in every row")
    if id_type == "string":
        _refuse_long(plain, file, row_start)
    return ids


def _refuse_long(ids: Any, file: str, row_start: int) -> None:
    lengths = pc.binary_length(ids)
    if (pc.max(lengths).as_py() or 0) > MAX_ID_BYTES:
        row = row_start + pc.index(pc.greater(lengths, MAX_ID_BYTES), True).as_py()
        found = f"an id of {lengths[row - row_start].as_py():,} bytes in row {row}"
        raise InputError(file, "input.id_column", found, f"at most {MAX_ID_BYTES:,} bytes")


def _check_file(file: InputParquet, first: InputParquet, id_type: IdType, spec: JobSpec) -> None:
    here = check_columns(file.text, file.schema, spec)
    if here != id_type:
        kind = file.schema.field(spec.input.id_column).type
        found = f"column {spec.input.id_column!r} of type {kind}"
        raise InputError(file.text, "input.id_column", found, f"{id_type} ids, as in {first.text}")
    check_kept_types(file.text, file.schema, first.text, first.schema, spec)


def _cut(found: Scan, file: InputParquet, num_rows: int, keys: RepeatedKeys, spec: JobSpec) -> None:
    """Add the chunks of one file, holding the ids of one chunk and one batch."""
    if num_rows == 0:
        return
    chunk_rows = spec.run.chunk_rows
    held: list[RowId] = []
    row_start = 0
    found.files.append(InputFile(file.text, file.num_rows, file.footer_hash))
    for ids in iter_ids(file, spec.input.id_column, found.id_type, 0, num_rows):
        keys.add(id_keys(ids))
        held += ids
        last = row_start + len(held) == num_rows
        cut = len(held) if last else len(held) - len(held) % chunk_rows
        for start in range(0, cut, chunk_rows):
            part = held[start : min(start + chunk_rows, cut)]
            found.chunks.append(
                Chunk(
                    chunk_id=len(found.chunks),
                    file_index=len(found.files) - 1,
                    row_start=row_start + start,
                    num_rows=len(part),
                    id_digest=ids_digest(part),
                )
            )
        row_start += cut
        del held[:cut]


def _refuse_repeated(found: Scan, suspects: set[int], spec: JobSpec) -> None:
    """Compare the ids behind equal keys themselves, and refuse the first that comes twice.

    Raises:
        InputError: an id comes twice; names both places.
    """
    seen: dict[RowId, tuple[str, int]] = {}
    num_rows = Counter[int]()
    for chunk in found.chunks:
        num_rows[chunk.file_index] += chunk.num_rows
    for index, stop in num_rows.items():
        path, row = found.files[index].path, 0
        file = InputParquet.open(path)
        for ids in iter_ids(file, spec.input.id_column, found.id_type, 0, stop):
            for row_id, key in zip(ids, id_keys(ids).tolist(), strict=True):
                if key in suspects and row_id in seen:
                    first, first_row = seen[row_id]
                    text = f"id {row_id!r} in row {row} and in row {first_row} of {first}"
                    allowed = "ids that are unique over all inputs"
                    raise InputError(path, "input.id_column", text, allowed)
                if key in suspects:
                    seen[row_id] = (path, row)
                row += 1
