"""How far a running job is. What it keeps is bounded by a window of time, not by rows done."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.records import ChunkStats

_WINDOW_S = 20.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at one moment.

    Attributes:
        rows_done: committed rows, and finished rows of chunks under way.
        rows_error: committed error rows.
        tokens: generated so far, by earlier runs of the job too.
        tokens_per_s: over the last 20 seconds; None before the first replica is ready.
        mean_exit_layer: over all generated tokens; None before the first.
        eta_s: at this run's own rate so far, what is under way taken for half done; None before the
            first row of this run.
        elapsed_s: since this run began.
        coordinator_s: seconds of work of the coordinator itself, waiting and storage left out.
        storage_s: seconds it spent in commits and the event log.
        is_draining: whether it only waits for what is under way.
    """

    rows_total: int
    rows_done: int
    rows_error: int
    tokens: int
    tokens_per_s: float | None
    mean_exit_layer: float | None
    eta_s: float | None
    elapsed_s: float
    replicas: int
    replicas_ready: int
    chunks_total: int
    chunks_committed: int
    chunks_leased: int
    chunks_pending: int
    coordinator_s: float
    storage_s: float
    is_draining: bool


@dataclass(frozen=True, slots=True)
class Recoveries:
    """What went wrong in a run and was put right; they merge by `+`.

    Attributes:
        replicas_left: replicas that gave their chunks back because they were told to end.
        chunks_returned: leases that went back because their replica died or left.
        chunks_copied: leases to a second replica, of the last chunks.
        copies_first: chunks whose copy was committed.
        rows_set_aside: rows that kill replicas and became error rows.
        memory_shortages: steps that ran out of memory, and were done again with fewer rows.
    """

    replica_deaths: int = 0
    replicas_left: int = 0
    chunks_returned: int = 0
    chunks_copied: int = 0
    copies_first: int = 0
    attempts_discarded: int = 0
    rows_set_aside: int = 0
    memory_shortages: int = 0

    def __add__(self, other: Recoveries) -> Recoveries:
        return Recoveries(
            replica_deaths=self.replica_deaths + other.replica_deaths,
            replicas_left=self.replicas_left + other.replicas_left,
            chunks_returned=self.chunks_returned + other.chunks_returned,
            chunks_copied=self.chunks_copied + other.chunks_copied,
            copies_first=self.copies_first + other.copies_first,
            attempts_discarded=self.attempts_discarded + other.attempts_discarded,
            rows_set_aside=self.rows_set_aside + other.rows_set_aside,
            memory_shortages=self.memory_shortages + other.memory_shortages,
        )


class Stopwatch:
    """Adds up the seconds spent in blocks.

    Attributes:
        total_s: of all blocks so far.
    """

    def __init__(self) -> None:
        self.total_s = self._entered_s = 0.0

    def __enter__(self) -> None:
        self._entered_s = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.total_s += time.monotonic() - self._entered_s


class Meter:
    """Adds up the live counters of replicas that come and go, on top of what was committed before.

    Args:
        committed: totals of earlier runs.
        now_s: monotonic time of the run's start.
        rows_total: rows that the run is about, those of earlier runs that count as done included.
        rows_before: rows that count as done at its start.
        samples: generations of a row; a replica holds each of them as a sequence of its own.

    Attributes:
        rows_settled: rows done for good.
    """

    def __init__(
        self,
        committed: ChunkStats,
        now_s: float,
        rows_total: int,
        rows_before: int,
        samples: int = 1,
    ) -> None:
        self._rows_total, self._rows_before = rows_total, rows_before
        self._samples = samples
        self.rows_settled = rows_before
        self._histogram = Counter(committed.exit_histogram)
        self._seen: dict[int, tuple[str, LoopProgress]] = {}
        self._window: deque[tuple[float, int]] = deque()
        self._working_since_s: float | None = None
        self.started_s = now_s

    @property
    def tokens(self) -> int:
        return self._histogram.total()

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean over all tokens; None before the first one."""
        return ChunkStats(exit_histogram=self._histogram).mean_exit_layer

    def update(self, slot: int, replica: str, progress: LoopProgress) -> None:
        """Take in a replica's counters, which start at zero with each new replica of a slot."""
        name, last = self._seen.get(slot, (replica, LoopProgress()))
        base = last.exit_histogram if name == replica else Counter()
        self._seen[slot] = (replica, progress)
        self._histogram += progress.exit_histogram - base

    def replica_is_ready(self, now_s: float) -> None:
        """The time before the first replica is ready counts in no rate."""
        if self._working_since_s is None:
            self._working_since_s = now_s
            self._window = deque([(now_s, self.tokens)])

    def settle(self, totals: ChunkStats) -> None:
        """Once all is committed, the totals are exact.

        Live counters lag behind, which makes up for it; they also have what died with its replica,
        which was made all the same and stays in the rate.
        """
        before = self.tokens
        self._histogram = Counter(totals.exit_histogram)
        lost = max(0, before - self.tokens)
        self._window = deque((then_s, tokens - lost) for then_s, tokens in self._window)

    def working_s(self, now_s: float) -> float:
        """Seconds since the first replica was ready."""
        return 0.0 if self._working_since_s is None else now_s - self._working_since_s

    def tokens_per_s(self, now_s: float) -> float | None:
        """Rate over the window; None before the first replica is ready. Call it once per look."""
        if self._working_since_s is None:
            return None
        self._window.append((now_s, self.tokens))
        while len(self._window) > 2 and now_s - self._window[1][0] >= _WINDOW_S:
            self._window.popleft()
        then_s, tokens_then = self._window[0]
        return (self.tokens - tokens_then) / (now_s - then_s) if now_s > then_s else None

    def progress(
        self, now_s: float, *, open_rows: int, waited_s: float, storage_s: float, **facts: Any
    ) -> Progress:
        """The job at this moment.

        Args:
            now_s: monotonic time.
            open_rows: finished rows that are not settled yet.
            waited_s: seconds that the coordinator has waited.
            storage_s: seconds that it has spent on storage.
            facts: the attributes of `Progress` that no meter knows.
        """
        # A chunk that is called off is heard of a moment later.
        rows_done = min(self._rows_total, self.rows_settled + open_rows)
        elapsed_s = now_s - self.started_s
        return Progress(
            rows_total=self._rows_total,
            rows_done=rows_done,
            tokens=self.tokens,
            tokens_per_s=self.tokens_per_s(now_s),
            mean_exit_layer=self.mean_exit_layer,
            eta_s=self.eta_s(rows_done, now_s),
            elapsed_s=elapsed_s,
            coordinator_s=elapsed_s - waited_s - storage_s,
            storage_s=storage_s,
            **facts,
        )

    def eta_s(self, rows_done: int, now_s: float) -> float | None:
        """Seconds left at this run's own rate.

        What replicas hold is half done on average. Without that a run whose first row of many has
        just finished would seem to last as many times as long.
        """
        rows = rows_done - self._rows_before
        left = self._rows_total - rows_done
        held = sum(progress.max_resident for _, progress in self._seen.values())
        half = min(left, held / self._samples) / 2
        return (left - half) * self.working_s(now_s) / (rows + half) if rows > 0 else None
