"""The rows that kill are found, all others come out, and what that costs is bounded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eevp_batch.cluster.backlog import Backlog, ChunkTask
from eevp_batch.cluster.bisection import Bisection, patience, row_deaths
from eevp_batch.cluster.deaths import MAX_DEATHS_IN_A_ROW, DeathWatch
from eevp_batch.cluster.fleet import Slot
from eevp_batch.cluster.leases import SUSPECT_AFTER, Lease
from eevp_batch.errors import JobFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import RunSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.plan import Chunk, Plan

MAX_LEASES = 3

Row = tuple[int, int]  # chunk and number


def plan_of(sizes: list[int]) -> Plan:
    chunks = [Chunk(number, 0, 0, size, "") for number, size in enumerate(sizes)]
    return Plan(1, "", {}, [], chunks, sum(sizes), "int64", "run", "model", "")


def attempt_at(lease: Lease, num_rows: int) -> Attempt:
    stats = ChunkStats(rows_ok=num_rows)
    return Attempt(
        chunk_id=lease.chunk_id,
        epoch=lease.epoch,
        attempt_no=lease.attempt_no,
        replica=lease.replica,
        data_path=None,
        data_sha256=None,
        data_bytes=0,
        errors_path=None,
        errors_sha256=None,
        errors_bytes=0,
        rows_ok=num_rows,
        rows_error=0,
        generations=num_rows,
        id_digest="",
        stats=stats,
        started_unix_s=0.0,
        finished_unix_s=0.0,
    )


@dataclass
class Walk:
    """A backlog worked off by replicas that die of certain rows, and for no reason at all.

    Attributes:
        accidents: turns of replicas, counted over all of them, in which they die of nothing.
        runs: how often each row was run.
        done: rows that came out, by their last run.
        given_up: rows that were set aside.
        deaths: of replicas.
        deaths_of: deaths by chunk that they hold.
    """

    sizes: list[int]
    poison: set[Row]
    max_attempts: int = 3
    accidents: frozenset[int] = frozenset()
    num_replicas: int = 2
    runs: Counter[Row] = field(default_factory=Counter)
    done: list[Row] = field(default_factory=list)
    given_up: list[Row] = field(default_factory=list)
    deaths: int = 0
    turn: int = 0

    def __post_init__(self) -> None:
        self.backlog = Backlog(
            plan_of(self.sizes), range(len(self.sizes)), len(self.sizes), self.max_attempts
        )
        self.tasks: dict[Lease, ChunkTask] = {}

    def run(self) -> None:
        while self.backlog.leases.num_unfinished:
            assert self.turn < 10_000, "the walk does not end"
            for index in range(self.num_replicas):
                self.lease(f"replica {index}")
            for index in range(self.num_replicas):
                self.work(f"replica {index}")

    def lease(self, replica: str) -> None:
        while len(self.backlog.leases.leases_of(replica)) < MAX_LEASES:
            found = self.backlog.lease(replica, "exits")
            if found is None:
                return
            self.tasks[found[0]] = found[1]

    def work(self, replica: str) -> None:
        self.turn += 1
        held = self.backlog.leases.leases_of(replica)
        rows = {lease: self.rows(lease) for lease in held}
        everything = {row for some in rows.values() for row in some}
        self.runs.update(everything)
        if held and (everything & self.poison or self.turn in self.accidents):
            self.deaths += 1
            self.backlog.release(replica, "it died")
            return
        for lease in held:
            attempt = attempt_at(lease, len(rows[lease]))
            self.done += rows[lease]
            if not self.backlog.take_piece(lease, attempt):
                self.given_up += [
                    (lease.chunk_id, row.number) for row in self.tasks[lease].set_aside
                ]
                self.check_whole(lease)
                self.backlog.commit(lease)

    def rows(self, lease: Lease) -> list[Row]:
        start, stop = self.tasks[lease].span or (0, self.sizes[lease.chunk_id])
        return [(lease.chunk_id, number) for number in range(start, stop)]

    def check_whole(self, lease: Lease) -> None:
        task = self.tasks[lease]
        assert task.is_whole, "what is committed accounts for the whole chunk"
        counted = sum(piece.rows_ok for piece in task.pieces) + len(self.rows(lease))
        assert counted + len(task.set_aside) == self.sizes[lease.chunk_id]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], set[Row]]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    rows = [(chunk, number) for chunk, size in enumerate(sizes) for number in range(size)]
    return sizes, draw(st.sets(st.sampled_from(rows), max_size=4))


@given(jobs(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_exactly_the_rows_that_kill_are_set_aside_within_the_bounds(
    job: tuple[list[int], set[Row]], max_attempts: int, num_replicas: int
) -> None:
    sizes, poison = job
    walk = Walk(sizes, poison, max_attempts, num_replicas=num_replicas)
    walk.run()
    everything = {(chunk, number) for chunk, size in enumerate(sizes) for number in range(size)}
    assert sorted(walk.done) == sorted(everything - poison), "each other row comes out, once"
    assert sorted(walk.given_up) == sorted(poison), "the rows that kill are found, and no others"
    deaths = 0
    for chunk, size in enumerate(sizes):
        levels, tries = math.ceil(math.log2(size)), row_deaths(max_attempts)
        killers = sum(row[0] == chunk for row in poison)
        deaths += (SUSPECT_AFTER if killers else 0) + killers * (levels + tries)
        for number in range(size):
            most = SUSPECT_AFTER + levels + (tries if (chunk, number) in poison else 1)
            assert walk.runs[chunk, number] <= most, f"row {number} of {size} ran too often"
    assert walk.deaths <= deaths, f"{walk.deaths} deaths, {deaths} promised"


@given(jobs(), st.sets(st.integers(1, 60), max_size=2))
@settings(max_examples=200, deadline=None)
def test_deaths_for_no_reason_cost_no_row(
    job: tuple[list[int], set[Row]], accidents: set[int]
) -> None:
    """Fewer accidents than it takes to set a row aside never do, wherever they happen."""
    sizes, poison = job
    walk = Walk(sizes, poison, accidents=frozenset(accidents))
    walk.run()
    assert sorted(walk.given_up) == sorted(poison), "an innocent row was given up"
    assert len(walk.done) == sum(sizes) - len(poison)


def test_many_accidents_cost_time_and_no_rows() -> None:
    """Every second turn kills its replica: no row is alone each time."""
    walk = Walk([32] * 60, set(), accidents=frozenset(range(0, 3000, 2)), num_replicas=3)
    walk.run()
    assert walk.deaths > 20 and not walk.given_up
    assert sorted(walk.done) == [(c, r) for c in range(60) for r in range(32)]


def test_one_death_never_sets_a_row_aside() -> None:
    assert row_deaths(max_attempts=1) == 2
    bisection = Bisection(1, row_deaths(1))
    assert bisection.died("once") is None
    found = bisection.died("twice")
    assert found is not None and (found.number, found.deaths, found.reason) == (0, 2, "twice")
    assert bisection.span == (0, 0) and bisection.is_last, "nothing is left to run"
    assert bisection.died("while the pieces are put together") is None


@pytest.mark.parametrize("num_rows", [1, 7, 256])
def test_the_job_bears_the_deaths_of_one_row_and_not_those_of_all(num_rows: int) -> None:
    run = RunSpec(chunk_rows=num_rows, max_attempts=3)
    slot = Slot(0)
    watch = DeathWatch([slot], run)
    one_row = math.ceil(math.log2(num_rows)) + row_deaths(3)
    for _ in range(one_row):
        watch.died(slot, "a row", tried_suspect=True)
    watch.finished()
    with pytest.raises(JobFailedError, match="the last one: every row"):
        for _ in range(patience(num_rows, 3) + 1):
            watch.died(slot, "every row", tried_suspect=True)
    assert slot.deaths_in_a_row == 0, "deaths of suspects do not delay the next start"
    watch.finished()
    with pytest.raises(JobFailedError, match=f"{MAX_DEATHS_IN_A_ROW} replicas"):
        for _ in range(MAX_DEATHS_IN_A_ROW):
            watch.died(slot, "it does not start", tried_suspect=False)
