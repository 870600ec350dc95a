"""The replica's side of a commit: a chunk's results, written under a name that nobody reads yet."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.records import ChunkStats, Generation, Phase, RowFailure
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.chunks import build_tables, result_ids
from eevp_batch.storage.ids import ids_digest
from eevp_batch.storage.plan import Chunk, Plan
from eevp_batch.storage.store import Store


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease's results, as the replica reports them.

    Attributes:
        epoch: the lease they were made under; a chunk that is leased again gets a higher one.
        attempt_no: how often the chunk was leased, from 1; the `attempt` column.
        data_path: relative name of the generations; None where every row failed.
        errors_path: relative name of the error rows; None where no row failed.
        rows_ok, rows_error: input rows.
        generations: output rows.
        id_digest: `ids_digest` of the row ids in both files.
        phase: how the rows were run.
        patch: 0 for the whole chunk; 1.. for the rows that this patch of it tried again, its error
            rows being all that the chunk has left.
    """

    chunk_id: int
    epoch: int
    attempt_no: int
    replica: str
    data_path: str | None
    data_sha256: str | None
    data_bytes: int
    errors_path: str | None
    errors_sha256: str | None
    errors_bytes: int
    rows_ok: int
    rows_error: int
    generations: int
    id_digest: str
    stats: ChunkStats
    started_unix_s: float
    finished_unix_s: float
    phase: Phase = "exits"
    patch: int = 0

    @property
    def paths(self) -> list[str]:
        """The files it consists of."""
        return [path for path in (self.data_path, self.errors_path) if path is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "stats": self.stats.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attempt:
        """The inverse of `to_json`."""
        return cls(**{**data, "stats": ChunkStats.from_json(data["stats"])})


def write_attempt(
    store: Store,
    plan: Plan,
    spec: JobSpec,
    chunk: Chunk,
    epoch: int,
    attempt_no: int,
    source: Any,
    generations: Sequence[Generation],
    failures: Sequence[RowFailure],
    replica: str,
    started: float,
    phase: Phase = "exits",
    patch: int = 0,
    pieces: Sequence[Attempt] = (),
) -> Attempt:
    """Write a chunk's results durably and describe them.

    `source` holds the rows that the results are of, from what `read_chunk` gave for this chunk;
    `started` is the unix seconds at which the replica began with it. What is in `pieces`, attempts
    at other rows of the chunk, becomes part of this one. File names carry the epoch and a random
    part: no two writers share one.

    Raises:
        EngineError: a row has no result, two results, or not all of its samples.
        OSError: the storage refused.
    """
    own = build_tables(plan, spec, chunk, attempt_no, source, generations, failures, phase)
    data, errors = join_pieces(store, pieces, own) if pieces else own
    token = uuid.uuid4().hex[:8]
    compression = spec.output.compression
    data_file = _write(store, layout.attempt_data(chunk.chunk_id, epoch, token), data, compression)
    errors_file = _write(
        store, layout.attempt_errors(chunk.chunk_id, epoch, token), errors, compression
    )
    finished = time.time()
    stats = ChunkStats.of(list(generations), list(failures), max(finished - started, 0.0))
    stats = sum((piece.stats for piece in pieces), start=stats)
    return Attempt(
        chunk_id=chunk.chunk_id,
        epoch=epoch,
        attempt_no=attempt_no,
        replica=replica,
        data_path=data_file.path,
        data_sha256=data_file.sha256,
        data_bytes=data_file.num_bytes,
        errors_path=errors_file.path,
        errors_sha256=errors_file.sha256,
        errors_bytes=errors_file.num_bytes,
        rows_ok=stats.rows_ok,
        rows_error=stats.rows_error,
        generations=stats.generations,
        id_digest=ids_digest(result_ids(data, errors)),
        stats=stats,
        started_unix_s=started,
        finished_unix_s=finished,
        phase=phase,
        patch=patch,
    )


Tables = tuple[Any | None, Any | None]


def join_pieces(store: Store, pieces: Sequence[Attempt], own: Tables) -> Tables:
    """The two tables of a chunk that was run piece by piece, oldest piece first."""
    data = [_read(store, piece.data_path) for piece in pieces]
    errors = [_read(store, piece.errors_path) for piece in pieces]
    return _joined([*data, own[0]]), _joined([*errors, own[1]])


def _read(store: Store, rel: str | None) -> Any | None:
    return None if rel is None else pq.read_table(pa.BufferReader(store.read(rel)))


def _joined(tables: Sequence[Any | None]) -> Any | None:
    found = [table for table in tables if table is not None]
    return pa.concat_tables(found) if found else None


@dataclass(frozen=True, slots=True)
class _Written:
    path: str | None = None
    sha256: str | None = None
    num_bytes: int = 0


def _write(store: Store, rel: str, table: Any | None, compression: str) -> _Written:
    if table is None:
        return _Written()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    content = sink.getvalue().to_pybytes()
    store.write(rel, content)
    return _Written(rel, hashlib.sha256(content).hexdigest(), len(content))
