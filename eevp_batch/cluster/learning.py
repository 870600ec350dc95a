"""How a job with `exit.mode: learn` comes by its exits.

Every chunk has a *phase*, decided when it is leased and written into its commit record and rows:
`full` (no exits) or `exits`. The job begins with all leases `full`. First in line are the *learning
chunks*: random ones, by the job's seed, so that what is learned holds for the rest of the input;
exits are learned from their rows and no others. Once all of them are committed one replica gets no
more chunks and, when those that it holds are finished, learns: it searches exit layers and fits
heads, bridges and the proposal on one part of the rows, and certifies thresholds on the other
(`learn_task`). The other replicas go on at full depth. The replica writes what it found as an
attempt; the coordinator publishes it and creates `_eevp/learned.json`: from there on every lease
has the phase `exits`, or, where nothing could be certified or the exits would save less time than
they cost, `full` to the end (`storage.learned`).

Killed at any point and resumed, a job finds all of its state in storage: with the record it goes on
in the phase that the record says; without it, whatever lies in `_eevp/learned/` or among the
attempts is removed, learning chunks that are missing are made, and exits are learned again. Which
rows they are learned from depends on the plan alone. A replica that dies while it learns is
followed by another, `run.max_attempts` times in all; then the job goes on at full depth and says
so.

This module is the driver's side and knows no tensors.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from eevp_batch.cluster.engine_loop import RowEncoder
from eevp_batch.records import Phase
from eevp_batch.spec import JobSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.learned import Learned, publish_learned, read_learned
from eevp_batch.storage.plan import Chunk, Plan
from eevp_batch.storage.store import Store
from eevp_batch.tune.bounds import least_rows

CALIBRATION_SHARE = 0.6
"""Of the rows; the others are what exits are fitted to."""
_MARGIN = 1.5  # calibration rows for each that would do if no token ever differed
MOST_OF_A_JOB = 0.25
"""Share of a job's rows that are learned from without being told to."""

State = Literal["settled", "collecting", "learning"]


@dataclass(frozen=True, slots=True)
class LearnOrder:
    """What a replica is to learn from.

    Attributes:
        chunks: all of them committed at full depth.
        num_rows: rows in them.
        rows_left: rows of the job that could have exits.
        seconds_per_row: of the job so far, at full depth.
    """

    chunks: list[Chunk]
    num_rows: int
    rows_left: int
    seconds_per_row: float


@dataclass(frozen=True, slots=True)
class LearnAttempt:
    """What a replica has learned, in files under the names of this attempt.

    Attributes:
        token: names them.
    """

    token: str
    learned: Learned


@runtime_checkable
class LearningEngine(Protocol):
    """An engine that can learn exits while nothing is resident."""

    def learn(self, order: LearnOrder, encoder: RowEncoder, store: Store) -> LearnAttempt:
        """Learn, and leave the files of an attempt."""


class Learning:
    """Decides in which phase a chunk is leased, and when exits are learned.

    Args:
        spec: the job.
        plan: its chunks.
        store: its output folder; what a crash left there has been cleaned up.
    """

    def __init__(self, spec: JobSpec, plan: Plan, store: Store) -> None:
        self._spec, self._plan, self._store = spec, plan, store
        self.phase: Phase = "full" if spec.exit.mode == "off" else "exits"
        self._state: State = "settled"
        self._chunks: list[int] = []
        self._missing: set[int] = set()
        self._span = _Span()
        self._attempts = 0
        if spec.exit.mode == "learn":
            self._begin()

    def _begin(self) -> None:
        """Find out from storage where the job stands."""
        learned = read_learned(self._store)
        if learned is not None:
            self.phase = "exits" if learned.has_exits else "full"
            return
        self.phase = "full"
        self._chunks = learning_chunks(self._spec, self._plan)
        self._missing = set(self._chunks)
        self._state = "collecting"

    @property
    def is_collecting(self) -> bool:
        """Whether it counts the attempts that are committed, by earlier runs as well."""
        return self._state == "collecting"

    def too_small(self) -> Learned | None:
        """Settle a job that has too few rows to learn from; None where it has enough."""
        if not self.is_collecting or self._chunks:
            return None
        needed = rows_to_learn(self._spec)
        reason = (
            f"exit.delta {self._spec.exit.delta:g} and exit.epsilon {self._spec.exit.epsilon:g} "
            f"take {needed} rows, more than {MOST_OF_A_JOB:.0%} of {self._plan.num_rows}; "
            "exit.learn_rows may name as many all the same"
        )
        return self._give_up(reason)

    def order(self) -> Iterator[int]:
        """All chunks as they are leased: the learning chunks first."""
        first = set(self._chunks)
        yield from self._chunks
        yield from (c.chunk_id for c in self._plan.chunks if c.chunk_id not in first)

    @property
    def is_due(self) -> bool:
        """Whether a replica should learn now."""
        return self.is_collecting and bool(self._chunks) and not self._missing

    def committed(self, attempt: Attempt) -> None:
        """Count an attempt in that was committed."""
        if self._state != "settled" and attempt.phase == "full":
            self._missing.discard(attempt.chunk_id)
            self._span.add(attempt)

    def begin(self, rows_left: int) -> LearnOrder:
        """What a replica is asked for."""
        self._state, self._attempts = "learning", self._attempts + 1
        chunks = [self._plan.chunks[chunk_id] for chunk_id in self._chunks]
        rows = sum(chunk.num_rows for chunk in chunks)
        return LearnOrder(chunks, rows, rows_left, self._span.seconds_per_row)

    def take(self, attempt: LearnAttempt) -> Learned:
        """Publish what a replica has learned; from now on leases have its phase."""
        publish_learned(self._store, attempt.learned, attempt.token)
        self._state = "settled"
        self.phase = "exits" if attempt.learned.has_exits else "full"
        return attempt.learned

    def lost(self) -> Learned | None:
        """The replica that was learning has died; what is settled by that, if anything is."""
        limit = self._spec.run.max_attempts
        if self._attempts < limit:
            self._state = "collecting"
            return None
        return self._give_up(f"{limit} replicas died while they learned (run.max_attempts)")

    def _give_up(self, reason: str) -> Learned:
        return self.take(LearnAttempt(uuid.uuid4().hex[:8], Learned(reason)))


@dataclass
class _Span:
    """How long some rows took, from the first one's start to the last one's end."""

    rows: int = 0
    started_unix_s: float = math.inf
    finished_unix_s: float = -math.inf

    def add(self, attempt: Attempt) -> None:
        self.rows += attempt.stats.rows
        self.started_unix_s = min(self.started_unix_s, attempt.started_unix_s)
        self.finished_unix_s = max(self.finished_unix_s, attempt.finished_unix_s)

    @property
    def seconds_per_row(self) -> float:
        return (self.finished_unix_s - self.started_unix_s) / self.rows if self.rows else 0.0


def rows_to_learn(spec: JobSpec) -> int:
    """Rows that exits are learned from, as the job says or as its certificate needs.

    Args:
        spec: a learning job.
    """
    exit = spec.exit
    if exit.learn_rows != "auto":
        return exit.learn_rows
    return math.ceil(_MARGIN * least_rows("betting", exit.delta, exit.epsilon) / CALIBRATION_SHARE)


def learning_chunks(spec: JobSpec, plan: Plan) -> list[int]:
    """Ids of the chunks that exits are learned from, ascending; none where the job is too small.

    Args:
        spec: a learning job.
        plan: its chunks.
    """
    wanted = rows_to_learn(spec)
    most = plan.num_rows if spec.exit.learn_rows != "auto" else MOST_OF_A_JOB * plan.num_rows
    if wanted > most:
        return []
    ids = random.Random(f"learn/{spec.sampling.seed}").sample(
        range(len(plan.chunks)), len(plan.chunks)
    )
    taken: list[int] = []
    rows = 0
    for chunk_id in ids:
        if rows >= wanted:
            break
        taken.append(chunk_id)
        rows += plan.chunks[chunk_id].num_rows
    return sorted(taken)


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    """The rows in random order."""
    return random.Random(f"learn/{seed}/rows").sample(list(rows), len(rows))
