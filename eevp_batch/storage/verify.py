"""Proof, from storage alone, that every input row is accounted for once and nothing was altered.

Parts are read one at a time, so memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from eevp_batch.errors import JobFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.commit_record import CommittedChunk, patch_counts, read_committed
from eevp_batch.storage.fingerprint import fingerprint_of
from eevp_batch.storage.ids import ids_digest
from eevp_batch.storage.part_file import PartFile
from eevp_batch.storage.plan import Chunk, Plan, read_plan
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
        damaged: the problems of each chunk that has a record, or a part without one.
    """

    problems: list[str] = field(default_factory=list)
    rows_in: int = 0
    rows_ok: int = 0
    rows_error: int = 0
    data_parts: int = 0
    errors_parts: int = 0
    totals: ChunkStats = field(default_factory=ChunkStats)
    damaged: dict[int, list[str]] = field(default_factory=dict)
    data_checksum: Any = field(default_factory=hashlib.sha256, repr=False)
    errors_checksum: Any = field(default_factory=hashlib.sha256, repr=False)

    def add(self, chunk_id: int, problems: Iterable[str]) -> None:
        """Take in what is wrong with one chunk."""
        for problem in problems:
            self.problems.append(problem)
            self.damaged.setdefault(chunk_id, []).append(problem)

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
    patches, published = patch_counts(store), _Published(len(plan.chunks))
    kinds: dict[str, Any] = {}
    for chunk in plan.chunks:
        try:
            found = read_committed(store, chunk.chunk_id, patches[chunk.chunk_id])
        except JobFailedError as error:
            report.add(chunk.chunk_id, [str(error)])
            continue
        if found is None:
            missing.append(chunk)
            continue
        published.add(found)
        report.totals += found.stats
        report.add(chunk.chunk_id, _record_problems(found, plan, chunk))
        report.add(chunk.chunk_id, _check_chunk(store, plan, chunk, found, report, kinds))
    report.problems += _missing_problems(missing, len(plan.chunks))
    _add_strays(report, store, plan, published, patches)
    num_found = report.rows_ok + report.rows_error
    if num_found != plan.num_rows:
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


def _record_problems(found: CommittedChunk, plan: Plan, chunk: Chunk) -> Iterator[str]:
    num_rows = chunk.num_rows
    for patch, record in enumerate(found.records):
        attempt, rel = record.attempt, layout.commit_record(chunk.chunk_id, patch)
        data = layout.data_part(chunk.chunk_id, patch) if attempt.rows_ok else None
        errors = layout.errors_part(chunk.chunk_id, patch) if attempt.rows_error else None
        facts = [
            ("fingerprint", record.fingerprint, plan.fingerprint),
            ("chunk_id", attempt.chunk_id, chunk.chunk_id),
            ("patch", attempt.patch, patch),
            ("rows", attempt.rows_ok + attempt.rows_error, num_rows),
            ("counted rows", attempt.stats.rows, num_rows),
            ("id_digest", attempt.id_digest, attempt.id_digest if patch else chunk.id_digest),
            ("data_path", attempt.data_path, data),
            ("errors_path", attempt.errors_path, errors),
        ]
        for name, value, expected in facts:
            if value != expected:
                yield f"{rel}: {name} is {value}, expected {expected}"
        num_rows = attempt.rows_error  # a patch is of the rows that were in error before it


def _check_chunk(
    store: Store,
    plan: Plan,
    chunk: Chunk,
    found: CommittedChunk,
    report: VerifyReport,
    kinds: dict[str, Any],
) -> Iterator[str]:
    """Read a chunk's parts, count them in the report, and yield what is wrong with them."""
    data = [
        PartFile.read(store, attempt.data_path, attempt.data_sha256)
        for attempt in found.attempts
        if attempt.data_path is not None
    ]
    last = found.last
    errors = (
        []
        if last.errors_path is None
        else [PartFile.read(store, last.errors_path, last.errors_sha256)]
    )
    for part in (*data, *errors):
        yield from part.problems
    report.data_parts += sum(part.content is not None for part in data)
    report.errors_parts += sum(part.content is not None for part in errors)
    for part in data:
        report.data_checksum.update(part.checksum_line)
    for part in errors:
        report.errors_checksum.update(part.checksum_line)
    for name, parts in (("data", data), ("errors", errors)):
        for part in parts:
            if part.table is not None:
                if not part.problems:  # a damaged part is no measure for the others
                    kinds.setdefault(name, part.table.schema)
                first = kinds.get(name, part.table.schema)
                yield from part.schema_problems(plan, first, is_data=name == "data")
    if all(part.has_columns for part in (*data, *errors)):
        yield from _content_problems(plan, chunk, found, data, errors, report)


def _content_problems(
    plan: Plan,
    chunk: Chunk,
    found: CommittedChunk,
    data: list[PartFile],
    errors: list[PartFile],
    report: VerifyReport,
) -> Iterator[str]:
    """Count a chunk's rows and samples in the report, and yield what does not add up."""
    done = _column(data, "row_id")
    failed = _column(errors, "row_id")
    samples = Counter(zip(done, _column(data, "sample_index"), strict=False))
    report.rows_ok += len(set(done))
    report.rows_error += len(failed)
    rows = Counter(set(done)) + Counter(failed)
    names = " and ".join(part.rel for part in (*data, *errors))
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
    if sum(_column(data, "generated_tokens")) != found.stats.generated_tokens:
        yield f"{names}: the generated tokens are not those that the commit record counts"


def _column(parts: list[PartFile], name: str) -> list[Any]:
    return [value for part in parts for value in part.column(name)]


def _missing_problems(missing: list[Chunk], total: int) -> Iterator[str]:
    if missing:
        rels = [layout.commit_record(chunk.chunk_id) for chunk in missing[:_NAMED_CHUNKS]]
        more = f" and {len(missing) - len(rels)} more" if len(missing) > len(rels) else ""
        names = ", ".join(rels)
        yield f"{len(missing)} of {total} chunks have no commit record: {names}{more}"


class _Published:
    """The parts that commit records name.

    One flag per chunk and folder, for a set of names would grow to gigabytes in a large job; names
    of patches' parts are kept, for they are few.
    """

    def __init__(self, num_chunks: int) -> None:
        folders = (layout.DATA_DIR, layout.ERRORS_DIR)
        self.flags = {name: bytearray(num_chunks) for name in folders}
        self.patched: set[str] = set()

    def add(self, found: CommittedChunk) -> None:
        """Take in a chunk's parts: every data part, the last errors part."""
        paths = [attempt.data_path for attempt in found.attempts] + [found.last.errors_path]
        for path in (path for path in paths if path is not None):
            folder, _, name = path.partition("/")
            chunk_id = layout.part_chunk_id(name)
            if chunk_id is None:
                self.patched.add(path)
            elif folder in self.flags and chunk_id < len(self.flags[folder]):
                self.flags[folder][chunk_id] = True

    def has(self, folder: str, name: str) -> bool:
        """Whether a record names this file."""
        chunk_id, flags = layout.part_chunk_id(name), self.flags[folder]
        if chunk_id is None:
            return f"{folder}/{name}" in self.patched
        return chunk_id < len(flags) and bool(flags[chunk_id])


def _add_strays(
    report: VerifyReport,
    store: Store,
    plan: Plan,
    published: _Published,
    patches: Mapping[int, int],
) -> None:
    """Files that a reader of the folder would take for output, but that no record names."""
    for folder in published.flags:
        for name in store.list(folder):
            problem = f"{folder}/{name}: no commit record names this file"
            if name[0] in "._" or published.has(folder, name):
                continue
            key = layout.part_key(name)
            if key is None or key[0] >= len(plan.chunks):
                report.problems.append(f"{problem}; it is not the job's, move it elsewhere")
            else:
                report.add(key[0], [problem])
    for chunk_id, patch in sorted(
        filter(None, map(layout.record_key, store.names(layout.COMMITS_DIR)))
    ):
        rel = layout.commit_record(chunk_id, patch)
        if chunk_id >= len(plan.chunks):
            report.add(chunk_id, [f"{rel}: the plan has no such chunk"])
        elif patch > patches.get(chunk_id, 0):
            report.add(chunk_id, [f"{rel}: a patch of what is not recorded"])


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
    for difference in _differences("", found, summary):
        yield f"{layout.SUCCESS}: {difference}"


def _differences(name: str, told: Any, held: Mapping[str, Any]) -> Iterator[str]:
    """What tells some JSON from what it should be, by the dotted names of its fields."""
    for key, expected in held.items():
        field_name, found = f"{name}{key}", told.get(key)
        if found == expected:
            continue
        if isinstance(found, dict) and isinstance(expected, dict):
            yield from _differences(f"{field_name}.", found, {**dict.fromkeys(found), **expected})
        elif isinstance(found, list) or isinstance(expected, list):
            yield f"{field_name} is not what storage holds"
        else:
            yield f"{field_name} is {found}, but storage holds {expected}"
