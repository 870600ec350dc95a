"""One thread that owns one engine: chunks of prompts in, chunks of results out.

Knows no Ray and no storage. The thread builds the engine and is the only one that ever touches it;
everybody else hands over a `ChunkWork` and waits for its future. Prompts of several chunks stand in
one first-in-first-out line before the engine, so its batch does not drain at a chunk's end.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from eevp_batch.cluster.chunk_work import ChunkResult, ChunkWork
from eevp_batch.cluster.idle_clock import IdleClock
from eevp_batch.cluster.watchdog import Pulse
from eevp_batch.errors import EngineError, EngineStalledError, RowError
from eevp_batch.records import Generation, Prompt, RowFailure, RowId
from eevp_batch.vitals import EngineVitals, vitals_of

_SNAPSHOT_EVERY_S = 0.25

_T = TypeVar("_T")


class EngineCounters(Protocol):
    """What an engine has counted since it was built."""

    @property
    def tokens(self) -> int:
        """Emitted tokens."""

    @property
    def exit_histogram(self) -> Counter[int]:
        """Emitted tokens by exit layer."""

    @property
    def shortages(self) -> int:
        """How often memory ran out in a step."""


class RowEngine(Protocol):
    """What a replica needs of an engine; `eevp_batch.engine.Engine` and scripted engines have it.

    Each prompt that was added comes out of `step` exactly once, as its generation or as a failure,
    unless it was given up.
    """

    @property
    def has_room(self) -> bool:
        """Whether another sequence may become resident now."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is resident."""

    @property
    def max_resident(self) -> int:
        """The most sequences that may ever be resident."""

    @property
    def stats(self) -> EngineCounters:
        """Counters so far."""

    def add(self, prompt: Prompt) -> None:
        """Make a prompt resident; a RowError says that this row can never be."""

    def step(self) -> Sequence[Generation | RowFailure]:
        """Run one batch through one segment; what finished."""

    def give_up(self, tag: int) -> int:
        """Drop the prompts with this tag, of which nothing comes out any more; how many."""


class RowEncoder(Protocol):
    """Turns an input row into prompt tokens."""

    @property
    def columns(self) -> Sequence[str]:
        """Input columns that `encode` reads."""

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        """Prompt tokens of one row; a RowError says that it has none."""


Build = Callable[[], tuple[RowEngine, RowEncoder]]


@dataclass(frozen=True, slots=True)
class LoopProgress:
    """What an engine loop has done and holds.

    Attributes:
        tokens, exit_histogram: since the engine was built.
        finished_rows: since the engine was built, rows without a prompt included.
        waiting_prompts: prompts that stand before the engine.
        max_resident: the most sequences that the engine of the moment can hold.
        shortages: how often memory ran out in a step, since the engine was built.
        doing: what the thread does, and for how long; empty before it is known.
        is_leaving: whether the replica's process was told to end.
        idle_s: seconds since the engine was built in which nothing ran on its devices.
        vitals: what else the engine tells.
    """

    tokens: int = 0
    exit_histogram: Counter[int] = field(default_factory=Counter)
    finished_rows: int = 0
    waiting_prompts: int = 0
    max_resident: int = 0
    shortages: int = 0
    doing: str = ""
    is_leaving: bool = False
    idle_s: float = 0.0
    vitals: EngineVitals = field(default_factory=EngineVitals)


class EngineLoop:
    """The thread, and the line of prompts before its engine.

    Any exception of the engine that is not a RowError ends the loop: it goes to every open chunk,
    to `built` and to every later `submit`.

    Attributes:
        built: the engine and its encoder.
        pulse: what the thread is doing.
    """

    def __init__(self, build: Build) -> None:
        self.built: Future[tuple[RowEngine, RowEncoder]] = Future()
        self.pulse = Pulse("builds its engine")
        self._build = build
        self._changed = threading.Condition()
        self._line: deque[Prompt] = deque()
        self._open: dict[int, ChunkWork] = {}
        self._tasks: deque[Callable[[], None]] = deque()
        self._called_off: deque[int] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        self._finished_rows = 0
        self._progress = LoopProgress()
        self._snapshot_due_s = 0.0
        self._idle: IdleClock | None = None  # before the engine is built
        self._thread = threading.Thread(target=self._run, name="eevp-engine", daemon=True)
        self._thread.start()

    def submit(self, work: ChunkWork) -> Future[ChunkResult]:
        """Put a chunk's prompts at the end of the line; any thread may call it."""
        with self._changed:
            self._finished_rows += work.num_failed
            if self._error is not None:
                work.future.set_exception(self._error)
            elif work.is_finished:
                work.finish()
            else:
                self._open[work.key] = work
                self._line.extend(work.prompts)
                self._changed.notify()
        return work.future

    def call_off(self, key: int) -> None:
        """Drop a chunk: its future is cancelled unless it is finished; any thread may call it."""
        with self._changed:
            self._called_off.append(key)

    def call(self, task: Callable[[RowEngine, RowEncoder], _T]) -> Future[_T]:
        """Run something else in the thread, once the engine has nothing to do; any thread may call.

        What the task raises goes to its future and ends nothing.
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(task(*self.built.result()))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._error is not None:
                future.set_exception(self._error)
            else:
                self._tasks.append(run)
                self._changed.notify()
        return future

    def progress(self) -> LoopProgress:
        """Counters, at most a quarter of a second old while the engine is busy."""
        idle_s = 0.0 if self._idle is None else self._idle.idle_s
        return replace(self._progress, doing=str(self.pulse), idle_s=idle_s)

    def close(self) -> None:
        """End the thread once the current step is over, and wait for that."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    # --- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine, encoder = self._build()
            self._idle = IdleClock()
            self.built.set_result((engine, encoder))
            while self._wait_for_work(engine):
                self._turn(engine, self._idle)
        except BaseException as error:
            self._fail(error)

    def _wait_for_work(self, engine: RowEngine) -> bool:
        """Sleep until there is something to do; False when the loop is closed."""
        with self._changed:
            if engine.is_idle and not self._line:
                self._take_snapshot(engine)
                self.pulse.begin("has nothing to generate")
            while not (self._line or self._tasks or self._is_closed) and engine.is_idle:
                self._changed.wait()
            return not self._is_closed

    def _turn(self, engine: RowEngine, idle: IdleClock) -> None:
        """Admit what fits, run one step, hand out what finished; or do one task."""
        if self._tasks and engine.is_idle and not self._line:
            self.pulse.begin("learns exits")
            with idle:
                self._tasks.popleft()()
            return
        self.pulse.begin("runs a step", is_bounded=True)
        if self._called_off and self._drop(engine):
            return
        admitted = self._admit(engine)
        if not engine.is_idle:
            with idle:
                results = engine.step()
            for result in results:
                self._settle(result.tag, result.row_id, result)
        elif not admitted:
            raise EngineStalledError(f"an idle engine admits none of {len(self._line)} prompts")
        if time.monotonic() >= self._snapshot_due_s:
            self._take_snapshot(engine)

    def _drop(self, engine: RowEngine) -> bool:
        """Drop the chunks that were called off; whether any was here."""
        num_open = len(self._open)
        with self._changed:
            keys = {key for key in self._called_off if key in self._open}
            self._called_off.clear()
            dropped = [self._open.pop(key) for key in keys]
            self._line = deque(prompt for prompt in self._line if prompt.tag not in keys)
            self._finished_rows -= sum(work.num_finished for work in dropped)
        for work in dropped:
            engine.give_up(work.key)
            work.future.cancel()
        return len(self._open) < num_open

    def _admit(self, engine: RowEngine) -> int:
        """Move prompts from the line into the engine; how many left the line."""
        admitted = 0
        while self._line and engine.has_room:
            prompt = self._line.popleft()
            admitted += 1
            if self._open[prompt.tag].has_failed(prompt.row_id):
                self._settle(prompt.tag, prompt.row_id, None)
                continue
            try:
                engine.add(prompt)
            except RowError as error:
                failure = RowFailure.of(prompt.row_id, error)
                self._settle(prompt.tag, prompt.row_id, failure)
        return admitted

    def _settle(self, key: int, row_id: RowId, result: Generation | RowFailure | None) -> None:
        work = self._open.get(key)
        if work is None:
            raise EngineError(f"the engine gave a result for no open chunk: row {row_id!r}")
        if not work.settle(row_id, result):
            return
        with self._changed:
            self._finished_rows += 1
            if work.is_finished:
                del self._open[key]
        if work.is_finished:
            work.finish()

    def _take_snapshot(self, engine: RowEngine) -> None:
        self._snapshot_due_s = time.monotonic() + _SNAPSHOT_EVERY_S
        self._progress = LoopProgress(
            tokens=engine.stats.tokens,
            exit_histogram=Counter(engine.stats.exit_histogram),
            finished_rows=self._finished_rows,
            waiting_prompts=len(self._line),
            max_resident=engine.max_resident,
            shortages=engine.stats.shortages,
            vitals=vitals_of(engine),
        )

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            waiting = [work.future for work in self._open.values()]
            self._open.clear()
        if not self.built.done():
            self.built.set_exception(error)
        for future in waiting:
            future.set_exception(error)
