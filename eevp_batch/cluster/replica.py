"""One replica: a Ray actor with one engine, which turns leases into attempt files.

Input is read from storage and results are written to storage here; only leases, attempts (their
descriptions, not their rows) and counters cross Ray. The actor's event loop waits for many leases
at a time; one thread runs the engine, two others read, encode and write beside it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.chunk_work import ChunkWork
from eevp_batch.cluster.engine_loop import Build, EngineLoop, LoopProgress, RowEncoder, RowEngine
from eevp_batch.cluster.learning import LearnAttempt, LearningEngine, LearnOrder
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.machine import describe_machine
from eevp_batch.cluster.metrics import ReplicaMetrics
from eevp_batch.cluster.selection import Selection, select_rows, take_rows
from eevp_batch.cluster.sigterm import on_sigterm
from eevp_batch.cluster.watchdog import watch
from eevp_batch.errors import EevpError, EngineError, JobFailedError, RowError, UnreadableTextError
from eevp_batch.records import Phase, Prompt, RowFailure
from eevp_batch.spec import JobSpec
from eevp_batch.storage.chunks import iter_rows, read_chunk, table_ids, unreadable_rows
from eevp_batch.storage.commit import Attempt, write_attempt
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store

__all__ = ["Replica", "ReplicaReady", "RowEncoder", "RowEngine"]

_IO_THREADS = 2
_STORAGE_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """What a replica says of itself once its engine is built.

    Attributes:
        max_resident: the most sequences its engine can hold.
        start_s: seconds that building the engine took.
        machine: what `describe_machine` says.
    """

    pid: int
    node_id: str
    max_resident: int
    start_s: float
    machine: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What becomes of a lease for which there will be no attempt.

    Attributes:
        is_leaving: whether that is because the replica's process was told to end, or because the
            lease was called off.
    """

    is_leaving: bool


class Replica:
    """Makes attempts at chunks, several at a time, with one engine.

    Args:
        name: the replica's name, for attempts and messages.
        build: makes the engine and the prompt encoder; called once, in the engine's own thread.
        spec: the job.
        plan: the job's plan; its list of chunks is not used and may be empty.
        store_text: what `Store.open` takes.
    """

    def __init__(self, name: str, build: Build, spec: JobSpec, plan: Plan, store_text: str) -> None:
        self._name, self._spec, self._plan = name, spec, plan
        self._store = Store.open(store_text)
        self._io = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="eevp-io")
        self._started_s = time.monotonic()
        self._loop = EngineLoop(build)
        self._epochs: set[int] = set()  # of the leases that are here
        self._called_off: set[int] = set()
        self._is_leaving = False
        self._events: asyncio.AbstractEventLoop  # set by `ready`
        self._metrics = ReplicaMetrics(spec.name, plan.run_id, name)
        watch(name, self._loop.pulse, spec.run.no_progress_timeout_s)

    async def ready(self) -> ReplicaReady:
        """Wait until the engine is built; from now on, SIGTERM makes the replica leave.

        Raises:
            EevpError: what the package itself has to say against the job; starting again is no use.
            RuntimeError: the engine could not be built for a reason that may pass.
        """
        self._events = asyncio.get_running_loop()
        on_sigterm(self._told_to_end)
        try:
            engine, _ = await asyncio.wrap_future(self._loop.built)
        except EevpError as error:
            raise _told(error, self._name) from error
        except Exception as error:
            raise RuntimeError(f"{self._name} did not start: {_text(error)}") from error
        return ReplicaReady(
            pid=os.getpid(),
            node_id=_node_id(),
            max_resident=engine.max_resident,
            start_s=time.monotonic() - self._started_s,
            machine=describe_machine(),
        )

    async def process(self, lease: Lease, task: ChunkTask) -> Attempt | GivenUp:
        """Generate for a chunk's rows and write the attempt; overlaps with other leases.

        Raises:
            JobFailedError: an exception that belongs to no row.
        """
        if self._is_leaving:
            return GivenUp(is_leaving=True)
        self._epochs.add(lease.epoch)
        try:
            return await self._process(lease, task)
        except asyncio.CancelledError:
            return GivenUp(self._is_leaving)
        except Exception as error:
            raise _told(error, f"{self._name}, chunk {lease.chunk_id:05d}") from error
        finally:
            self._epochs.discard(lease.epoch)
            self._called_off.discard(lease.epoch)

    async def call_off(self, epoch: int) -> None:
        """Drop the lease of this epoch, unless its rows are generated already."""
        if epoch in self._epochs:
            self._called_off.add(epoch)
            self._loop.call_off(epoch)

    async def leave(self) -> None:
        """Give all leases back and take no more; what is generated already is still written."""
        self._is_leaving = True
        for epoch in tuple(self._epochs):
            await self.call_off(epoch)

    def _told_to_end(self) -> None:
        """The process got SIGTERM; in a thread of its own."""
        asyncio.run_coroutine_threadsafe(self.leave(), self._events)

    async def learn(self, order: LearnOrder) -> LearnAttempt:
        """Learn exits from what is committed, once the chunks that are here are finished.

        Raises:
            JobFailedError: an exception that says nothing about the exits.
        """

        def task(engine: RowEngine, encoder: RowEncoder) -> LearnAttempt:
            if not isinstance(engine, LearningEngine):
                raise EngineError(f"{type(engine).__name__} cannot learn exits")
            return engine.learn(order, encoder, self._store)

        try:
            return await asyncio.wrap_future(self._loop.call(task))
        except Exception as error:
            raise _told(error, f"{self._name}, learning exits") from error

    async def progress(self) -> LoopProgress:
        """Counters of the engine, and what it is doing; they are published at the same time."""
        found = replace(self._loop.progress(), is_leaving=self._is_leaving)
        self._metrics.publish(found)
        return found

    async def _process(self, lease: Lease, task: ChunkTask) -> Attempt:
        started_unix_s = time.time()
        _, encoder = await asyncio.wrap_future(self._loop.built)
        run = asyncio.get_running_loop().run_in_executor
        loaded = await run(self._io, self._load, lease, task, encoder)
        if lease.epoch in self._called_off:
            raise asyncio.CancelledError
        result = await asyncio.wrap_future(self._loop.submit(loaded.work))
        attempt = await run(
            self._io,
            lambda: write_attempt(
                self._store,
                self._plan,
                self._spec,
                task.chunk,
                lease.epoch,
                lease.attempt_no,
                loaded.source,
                result.generations,
                loaded.selection.failures(result.failures),
                self._name,
                started_unix_s,
                lease.phase,
                task.patch.number if task.patch else 0,
                task.pieces if task.is_whole else (),
            ),
        )
        self._metrics.chunk_is_written(attempt.stats.busy_s)
        return attempt

    def _load(self, lease: Lease, task: ChunkTask, encoder: RowEncoder) -> _Loaded:
        """Read a chunk's rows and encode those that are to run."""
        chunk = task.chunk
        source = read_chunk(self._plan, chunk, encoder.columns)
        ids = table_ids(source, self._plan, self._plan.files[chunk.file_index].path)
        selection = select_rows(self._store, task, ids)
        needed = _unique([self._spec.input.id_column, *encoder.columns])
        part = take_rows(source, selection.run)
        prompts, failures = encode_rows(
            iter_rows(part.select(needed)),
            unreadable_rows(part, _unique([*encoder.columns, *self._plan.kept_columns])),
            self._spec.input.id_column,
            encoder,
            self._spec.sampling.n,
            lease.epoch,
            lease.phase,
            self._spec.run.row_timeout_s,
        )
        work = ChunkWork(lease.epoch, prompts, failures)
        return _Loaded(take_rows(source, selection.accounted), selection, work)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a task has to do.

    Attributes:
        source: the rows that the attempt accounts for by itself.
    """

    source: pa.Table
    selection: Selection
    work: ChunkWork


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    unreadable: Mapping[int, str],
    id_column: str,
    encoder: RowEncoder,
    n: int,
    tag: int,
    phase: Phase = "exits",
    timeout_s: float | None = None,
) -> tuple[list[Prompt], list[RowFailure]]:
    """Encode each row once, for n samples; a row that cannot be done becomes a failure.

    Args:
        rows: the chunk's rows in order.
        unreadable: column by number of the rows that have text which is not UTF-8 in a column that
            is needed.
        id_column: the column of row ids.
        encoder: encodes a row's prompt.
        n: prompts per row.
        tag: goes into each prompt.
        phase: goes into each prompt.
        timeout_s: goes into each prompt.
    """
    prompts: list[Prompt] = []
    failures: list[RowFailure] = []
    for number, row in enumerate(rows):
        try:
            if number in unreadable:
                raise UnreadableTextError(f"column {unreadable[number]!r}: text that is not UTF-8")
            token_ids = encoder.encode(row)
        except RowError as error:
            failures.append(RowFailure.of(row[id_column], error))
            continue
        row_id = row[id_column]
        prompts += [Prompt(row_id, token_ids, sample, tag, phase, timeout_s) for sample in range(n)]
    return prompts, failures


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _told(error: Exception, where: str) -> JobFailedError:
    """The error as one that crosses Ray whole: a single text. A bug brings its traceback along."""
    refuses = isinstance(error, OSError) and error.errno in _STORAGE_REFUSES
    if refuses or isinstance(error, EevpError):
        return JobFailedError(f"{where}: {_text(error)}")
    origin = "".join(traceback.format_exception(error)).rstrip()
    return JobFailedError(f"{where}: {_text(error)}\n{origin}")
