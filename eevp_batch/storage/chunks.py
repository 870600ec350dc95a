"""One chunk in, one chunk out: its rows read from the input, its results as tables.

Both directions count: a chunk whose ids are not the planned ones is refused, and so are results
that do not account for every row exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from eevp_batch.errors import EngineError, InputError, JobFailedError
from eevp_batch.records import Generation, Phase, RowFailure, RowId
from eevp_batch.spec import JobSpec
from eevp_batch.storage.ids import ids_digest
from eevp_batch.storage.inputs import UNREADABLE, InputParquet, patiently
from eevp_batch.storage.plan import Chunk, Plan
from eevp_batch.storage.scan import plain_ids
from eevp_batch.storage.schema import error_schema, is_text, listed, output_schema, plain_type

_BATCH_ROWS = 1 << 8
MAX_CHUNK_BYTES = 512 << 20
"""Most bytes that a chunk's rows may take in memory: ids, kept columns, prompts."""


def read_chunk(plan: Plan, chunk: Chunk, columns: Sequence[str]) -> Any:
    """Read a chunk's rows: the id column, the kept columns and `columns`, each once, in that order.

    Encodings are taken off: a dictionary or large string arrives as plain values.

    Returns:
        pyarrow.Table [chunk.num_rows], in input order.

    Raises:
        JobFailedError: the file is gone or is not the one that was planned.
    """
    planned = plan.files[chunk.file_index]
    names = list(dict.fromkeys([plan.id_column, *plan.kept_columns, *columns]))
    try:
        file = InputParquet.open(planned.path)
        _check_unchanged(file, planned.footer_hash)
        _check_named(file, names)
        stop = chunk.row_start + chunk.num_rows
        read = partial(file.batches, names, chunk.row_start, stop, _BATCH_ROWS)
        batches = patiently(planned.path, lambda: _held(read(), file.text))
    except InputError as error:  # it names the file
        raise JobFailedError(f"chunk {chunk.name}: {error}") from error
    except UNREADABLE as error:
        raise JobFailedError(f"chunk {chunk.name}: {planned.path}: {error}") from error
    table = pa.concat_tables(batches).combine_chunks()
    if ids_digest(table_ids(table, plan, planned.path)) != chunk.id_digest:
        raise _changed(planned.path)
    return table


def _held(batches: Iterator[Any], file: str) -> list[Any]:
    """The batches, their encodings off; refused as soon as they are too much."""
    held: list[Any] = []
    num_bytes = 0
    for batch in batches:
        num_bytes += sum(_plain_bytes(column) for column in batch.columns)
        if num_bytes > MAX_CHUNK_BYTES:
            found = f"a chunk whose rows take more than {MAX_CHUNK_BYTES:,} bytes"
            raise InputError(file, "run.chunk_rows", found, "smaller chunks")
        held.append(_plain_table(pa.Table.from_batches([batch])))
    return held


def _plain_bytes(column: Any) -> int:
    """Bytes of a column whose encoding is off: a dictionary may hold one text for many rows."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    if not is_text(column.type.value_type):
        return int(column.indices.nbytes) * 8
    lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
    return int(pc.sum(lengths).as_py() or 0)


def table_ids(table: Any, plan: Plan, file: str) -> list[RowId]:
    """The row ids of a table that `read_chunk` gave."""
    return plain_ids(table.column(plan.id_column), plan.id_type, file, 0)


def iter_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table as dicts; a text that is not UTF-8 arrives as None, never as an error."""
    for batch in table.to_batches():
        for row in range(batch.num_rows):
            yield {
                name: _value(column[row])
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }


def unreadable_rows(table: Any, names: Sequence[str]) -> dict[int, str]:
    """Rows whose value in one of the columns is not valid (text that is not UTF-8).

    Returns:
        Column name by row number, 0-based.
    """
    found: dict[int, str] = {}
    for name in names:
        column = table.column(name)
        if not _is_valid(column):
            bad = (row for row in range(len(column)) if not _is_valid(column.slice(row, 1)))
            found |= {row: name for row in bad if row not in found}
    return found


def _is_valid(column: Any) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def build_tables(
    plan: Plan,
    spec: JobSpec,
    chunk: Chunk,
    attempt_no: int,
    source: Any,
    generations: Sequence[Generation],
    failures: Sequence[RowFailure],
    phase: Phase = "exits",
) -> tuple[Any | None, Any | None]:
    """Lay a chunk's results out as the two tables of its parts, in input order, then by sample.

    `source` is what `read_chunk` gave for this chunk.

    Returns:
        The data table, None where every row failed, and the error table, None where none did.

    Raises:
        EngineError: a row has no result, two results, or not all of its samples.
    """
    ids = table_ids(source, plan, plan.files[chunk.file_index].path)
    _check_accounted(ids, generations, failures, plan.num_samples)
    place = {row_id: row for row, row_id in enumerate(ids)}
    done = sorted(generations, key=lambda g: (place[g.row_id], g.sample_index))
    failed = sorted(failures, key=lambda f: place[f.row_id])
    data = _data_table(plan, spec, chunk, attempt_no, source, place, done, phase) if done else None
    return data, _error_table(plan, chunk, failed) if failed else None


def result_ids(data: Any | None, errors: Any | None) -> list[RowId]:
    """The row ids in a chunk's two tables: one per first sample, one per error row."""
    done = [] if data is None else data.column("row_id").to_pylist()
    samples = [] if data is None else data.column("sample_index").to_pylist()
    failed = [] if errors is None else errors.column("row_id").to_pylist()
    return [row_id for row_id, sample in zip(done, samples, strict=True) if sample == 0] + failed


def _data_table(
    plan: Plan,
    spec: JobSpec,
    chunk: Chunk,
    attempt_no: int,
    source: Any,
    place: dict[RowId, int],
    done: Sequence[Generation],
    phase: Phase,
) -> Any:
    schema = output_schema(source.schema, spec, plan.id_type, plan.metadata)
    carried = source.take(pa.array([place[g.row_id] for g in done], pa.int64()))
    columns: dict[str, Any] = {
        **{name: carried.column(name) for name in plan.kept_columns},
        "row_id": [g.row_id for g in done],
        "sample_index": [g.sample_index for g in done],
        "prompt_tokens": [g.prompt_tokens for g in done],
        "generated_tokens": [g.generated_tokens for g in done],
        "text": [_utf8(g.text) for g in done],
        "finish_reason": [g.finish_reason for g in done],
        "token_ids": [g.token_ids for g in done],
        "exit_layers": [g.exit_layers for g in done],
        "exit_confidences": [g.exit_confidences for g in done],
        "mean_exit_layer": [g.mean_exit_layer if g.exits else None for g in done],
        "layers_skipped_fraction": [g.layers_skipped_fraction if g.exits else None for g in done],
        "seed": [g.seed for g in done],
        "chunk_id": [chunk.chunk_id] * len(done),
        "attempt": [attempt_no] * len(done),
        "phase": [phase] * len(done),
        "audit_token_ids": [g.audit and g.audit.token_ids for g in done],
        "audit_first_divergence": [g.audit and g.audit.first_divergence for g in done],
        "audit_distance": [g.audit and g.audit.distance for g in done],
    }
    return _table(columns, schema)


def _error_table(plan: Plan, chunk: Chunk, failed: Sequence[RowFailure]) -> Any:
    columns = {
        "row_id": [f.row_id for f in failed],
        "error_class": [f.error_class for f in failed],
        "message": [_utf8(f.message) for f in failed],
        "attempts": [f.attempts for f in failed],
        "chunk_id": [chunk.chunk_id] * len(failed),
    }
    return _table(columns, error_schema(plan.id_type, plan.metadata))


def _table(columns: dict[str, Any], schema: Any) -> Any:
    arrays = [
        columns[field.name]
        if isinstance(columns[field.name], pa.ChunkedArray)
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _check_accounted(
    ids: Sequence[RowId],
    generations: Sequence[Generation],
    failures: Sequence[RowFailure],
    num_samples: int,
) -> None:
    """Refuse results in which a row is missing, stands twice, or lacks a sample.

    Raises:
        EngineError: names the first such row.
    """
    expected = Counter((row_id, sample) for row_id in ids for sample in range(num_samples))
    found = Counter((g.row_id, g.sample_index) for g in generations)
    found.update((f.row_id, sample) for f in failures for sample in range(num_samples))
    if found == expected:
        return
    row_id, sample = next(key for key in [*expected, *found] if found[key] != expected[key])
    raise EngineError(
        f"row {row_id!r}, sample {sample}: found {found[row_id, sample]} results; "
        f"allowed: {expected[row_id, sample]}"
    )


def _plain_table(table: Any) -> Any:
    """Take the encodings off every column."""
    fields = [pa.field(field.name, plain_type(field.type)) for field in table.schema]
    return table.cast(pa.schema(fields))


def _check_unchanged(file: InputParquet, footer_hash: str) -> None:
    if file.footer_hash != footer_hash:
        raise _changed(file.text)


def _check_named(file: InputParquet, names: Sequence[str]) -> None:
    for name in names:
        if name not in file.schema.names:
            allowed = f"one of {listed(file.schema.names)}"
            raise InputError(file.text, "columns", f"no column {name!r}", allowed)


def _changed(path: str) -> JobFailedError:
    return JobFailedError(
        f"{path} changed since the job was planned; put the planned file back, "
        "or start a new output folder"
    )


def _utf8(text: str) -> str:
    """Text that Parquet can hold: lone surrogates, which UTF-8 has no bytes for, become `?`."""
    return text.encode("utf-8", "replace").decode()
