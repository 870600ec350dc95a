"""Proof, from storage alone, that every input row is accounted for once and nothing was altered.

Parts are read one at a time, so memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.errors import JobFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.commit_record import CommitRecord, committed_chunks, read_record
from eevp_batch.storage.fingerprint import fingerprint_of
from eevp_batch.storage.ids import ids_digest
from eevp_batch.storage.inputs import UNREADABLE
from eevp_batch.storage.plan import Chunk, Plan, read_plan
from eevp_batch.storage.schema import error_schema, part_differences, schema_differences
from eevp_batch.storage.store import Store

_NAMED_CHUNKS = 10


@dataclass
class VerifyReport:
    """What was found.

    Attributes:
        problems: one sentence each, naming the file; empty when everything holds.
        rows_in: planned input rows.
        rows_ok, rows_error: rows found in readable parts of committed chunks.
        data_parts, errors_parts: published files that were read.
        totals: the counters of all commit records.
    """

    problems: list[str] = field(default_factory=list)
    rows_in: int = 0
    rows_ok: int = 0
    rows_error: int = 0
    data_parts: int = 0
    errors_parts: int = 0
    totals: ChunkStats = field(default_factory=ChunkStats)
    data_checksum: Any = field(default_factory=hashlib.sha256, repr=False)
    errors_checksum: Any = field(default_factory=hashlib.sha256, repr=False)

    @property
    def parts(self) -> int:
        """Published files that were read."""
        return self.data_parts + self.errors_parts

    def summary(self, plan: Plan) -> dict[str, Any]:
        """What `_SUCCESS` says of an output.

        A checksum covers the lines that `sha256sum data/part-*.parquet` prints, in chunk order.
        """
        return {
            "format_version": plan.format_version,
            "run_id": plan.run_id,
            "fingerprint": plan.fingerprint,
            "rows": {"in": self.rows_in, "ok": self.rows_ok, "error": self.rows_error},
            "parts": {"data": self.data_parts, "errors": self.errors_parts},
            "checksums": {
                "data": self.data_checksum.hexdigest(),
                "errors": self.errors_checksum.hexdigest(),
            },
            "totals": self.totals.to_json(),
        }


def verify(store: Store) -> VerifyReport:
    """Check a finished output folder, `_SUCCESS` included.

    Raises:
        UsageError: the folder holds no job.
        JobFailedError: its plan is damaged.
    """
    plan = read_plan(store)
    report = verify_parts(store, plan)
    report.problems += _success_problems(store, report.summary(plan))
    return report


def verify_parts(store: Store, plan: Plan) -> VerifyReport:
    """Check everything but `_SUCCESS`."""
    report = VerifyReport(rows_in=plan.num_rows)
    report.problems += _plan_problems(plan)
    missing: list[Chunk] = []
    # One flag per chunk and folder: a set of names would grow to gigabytes in a large job.
    published = {name: bytearray(len(plan.chunks)) for name in (layout.DATA_DIR, layout.ERRORS_DIR)}
    kinds: dict[str, Any] = {}
    for chunk in plan.chunks:
        try:
            record = read_record(store, chunk.chunk_id)
        except JobFailedError as error:
            report.problems.append(str(error))
            continue
        if record is None:
            missing.append(chunk)
            continue
        published[layout.DATA_DIR][chunk.chunk_id] = record.attempt.data_path is not None
        published[layout.ERRORS_DIR][chunk.chunk_id] = record.attempt.errors_path is not None
        report.totals += record.attempt.stats
        report.problems += _record_problems(record, plan, chunk)
        report.problems += _check_chunk(store, plan, chunk, record.attempt, report, kinds)
    report.problems += _missing_problems(missing, len(plan.chunks))
    report.problems += _stray_problems(store, plan, published)
    found = report.rows_ok + report.rows_error
    if found != plan.num_rows:
        report.problems.append(
            f"{layout.PLAN}: {plan.num_rows} rows in, but {report.rows_ok} rows ok and "
            f"{report.rows_error} rows in error"
        )
    return report


def _plan_problems(plan: Plan) -> Iterator[str]:
    if fingerprint_of(plan.fields) != plan.fingerprint:
        yield f"{layout.PLAN}: the fingerprint is not that of the fields"
    if sum(chunk.num_rows for chunk in plan.chunks) != plan.num_rows:
        yield f"{layout.PLAN}: the chunks do not add up to {plan.num_rows} rows"
    if [chunk.chunk_id for chunk in plan.chunks] != list(range(len(plan.chunks))):
        yield f"{layout.PLAN}: the chunks are not numbered 0 to {len(plan.chunks) - 1}"


def _record_problems(record: CommitRecord, plan: Plan, chunk: Chunk) -> Iterator[str]:
    attempt, rel = record.attempt, layout.commit_record(chunk.chunk_id)
    data = layout.data_part(chunk.chunk_id) if attempt.rows_ok else None
    errors = layout.errors_part(chunk.chunk_id) if attempt.rows_error else None
    facts = [
        ("fingerprint", record.fingerprint, plan.fingerprint),
        ("chunk_id", attempt.chunk_id, chunk.chunk_id),
        ("rows", attempt.rows_ok + attempt.rows_error, chunk.num_rows),
        ("counted rows", attempt.stats.rows, chunk.num_rows),
        ("id_digest", attempt.id_digest, chunk.id_digest),
        ("data_path", attempt.data_path, data),
        ("errors_path", attempt.errors_path, errors),
    ]
    for name, found, expected in facts:
        if found != expected:
            yield f"{rel}: {name} is {found}, expected {expected}"


def _check_chunk(
    store: Store,
    plan: Plan,
    chunk: Chunk,
    attempt: Attempt,
    report: VerifyReport,
    kinds: dict[str, Any],
) -> Iterator[str]:
    """Read a chunk's parts, count them in the report, and yield what is wrong with them."""
    data = errors = None
    if attempt.data_path is not None:
        data = _Part.read(store, attempt.data_path, attempt.data_sha256)
        yield from data.problems
        report.data_parts += data.content is not None
        report.data_checksum.update(data.checksum_line)
    if attempt.errors_path is not None:
        errors = _Part.read(store, attempt.errors_path, attempt.errors_sha256)
        yield from errors.problems
        report.errors_parts += errors.content is not None
        report.errors_checksum.update(errors.checksum_line)
    for part in (data, errors):
        if part is not None and part.table is not None:
            first = kinds.setdefault("data" if part is data else "errors", part.table.schema)
            yield from part.schema_problems(plan, first, is_data=part is data)
    if any(part is not None and not part.has_columns for part in (data, errors)):
        return
    yield from _content_problems(plan, chunk, attempt, data, errors, report)


@dataclass
class _Part:
    """One published file, read whole: a part holds one chunk."""

    rel: str
    content: bytes | None = None
    table: Any = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, store: Store, rel: str, sha256: str | None) -> _Part:
        """Read, check and decode one file; what is wrong with it goes into `problems`."""
        part = cls(rel)
        try:
            part.content = store.read(rel)
        except FileNotFoundError:
            part.problems.append(f"{rel}: the file is missing")
            return part
        except OSError as error:
            part.problems.append(f"{rel}: cannot be read: {error}")
            return part
        if hashlib.sha256(part.content).hexdigest() != sha256:
            part.problems.append(
                f"{rel}: the checksum is not the recorded one; the file was altered"
            )
        try:
            part.table = pq.read_table(pa.BufferReader(part.content))
            part.table.validate(full=True)
        except UNREADABLE as error:
            part.problems.append(f"{rel}: not a readable Parquet file: {error}")
            part.table = None
        return part

    @property
    def checksum_line(self) -> bytes:
        if self.content is None:
            return b""
        return f"{hashlib.sha256(self.content).hexdigest()}  {self.rel}\n".encode()

    @property
    def has_columns(self) -> bool:
        return self.table is not None and "row_id" in self.table.column_names

    def column(self, name: str) -> list[Any]:
        """A column's values; empty where the file is unreadable or has no such column."""
        if self.table is None or name not in self.table.column_names:
            return []
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def schema_problems(self, plan: Plan, first: Any, is_data: bool) -> Iterator[str]:
        """What tells the columns and metadata from the planned ones and from the first part's."""
        found = self.table.schema
        if is_data:
            differences = part_differences(
                found, plan.kept_columns, plan.id_type, plan.extras, plan.metadata
            )
        else:
            differences = schema_differences(found, error_schema(plan.id_type, plan.metadata))
        for difference in differences:
            yield f"{self.rel}: {difference}"
        if not found.equals(first, check_metadata=False):
            yield f"{self.rel}: the columns differ from those of the first part"


def _content_problems(
    plan: Plan,
    chunk: Chunk,
    attempt: Attempt,
    data: _Part | None,
    errors: _Part | None,
    report: VerifyReport,
) -> Iterator[str]:
    """Count a chunk's rows and samples in the report, and yield what does not add up."""
    done = data.column("row_id") if data else []
    failed = errors.column("row_id") if errors else []
    samples = Counter(zip(done, data.column("sample_index") if data else [], strict=False))
    report.rows_ok += len(set(done))
    report.rows_error += len(failed)
    rows = Counter(set(done)) + Counter(failed)
    names = " and ".join(part.rel for part in (data, errors) if part)
    for row_id in (row_id for row_id, count in rows.items() if count > 1):
        yield f"{names}: row {row_id!r} stands twice"
    for (row_id, sample), count in samples.items():
        if count > 1:
            yield f"{names}: row {row_id!r}, sample {sample} stands {count} times"
    expected = {(row_id, sample) for row_id in done for sample in range(plan.num_samples)}
    if set(samples) != expected:
        yield f"{names}: not every row has the samples 0 to {plan.num_samples - 1}"
    if ids_digest(rows.elements()) != chunk.id_digest:
        yield f"{names}: the row ids are not those of chunk {chunk.name}"
    if sum(data.column("generated_tokens") if data else []) != attempt.stats.generated_tokens:
        yield f"{names}: the generated tokens are not those that the commit record counts"


def _missing_problems(missing: list[Chunk], total: int) -> Iterator[str]:
    if missing:
        rels = [layout.commit_record(chunk.chunk_id) for chunk in missing[:_NAMED_CHUNKS]]
        more = f" and {len(missing) - len(rels)} more" if len(missing) > len(rels) else ""
        names = ", ".join(rels)
        yield f"{len(missing)} of {total} chunks have no commit record: {names}{more}"


def _stray_problems(store: Store, plan: Plan, published: dict[str, bytearray]) -> Iterator[str]:
    """Files that a reader of the folder would take for output, but that no record names."""
    for folder, flags in published.items():
        for name in store.list(folder):
            chunk_id = layout.part_chunk_id(name)
            known = chunk_id is not None and chunk_id < len(flags) and flags[chunk_id]
            if name[0] not in "._" and not known:
                yield f"{folder}/{name}: no commit record names this file"
    for chunk_id in sorted(committed_chunks(store)):
        if chunk_id >= len(plan.chunks):
            yield f"{layout.commit_record(chunk_id)}: the plan has no such chunk"


def _success_problems(store: Store, summary: dict[str, Any]) -> Iterator[str]:
    try:
        success = json.loads(store.read(layout.SUCCESS))
    except FileNotFoundError:
        yield f"{layout.SUCCESS}: the file is missing; the job has not finished"
        return
    except (ValueError, RecursionError) as error:
        yield f"{layout.SUCCESS}: not JSON: {error}"
        return
    found = success if isinstance(success, dict) else {}
    for name, expected in summary.items():
        if found.get(name) != expected:
            yield f"{layout.SUCCESS}: {name} is {found.get(name)}, but storage holds {expected}"
