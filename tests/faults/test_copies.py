"""Two replicas at one chunk, wherever processes die: it is committed once, as it should be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from eevp_batch.cluster import coordinator, stragglers
from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.stragglers import Straggler
from eevp_batch.errors import StaleAttemptError
from eevp_batch.storage.commit import Committer
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script
from tests.faults import fleet, history
from tests.faults.fleet import Replica
from tests.faults.history import Job, Setting, live
from tests.faults.machine import Crash, Machine

SMALL = Setting(files=(3, 2), chunk_rows=1, replicas=3, failing=frozenset({0, 4}))
MORE = Setting(files=(6, 3), chunk_rows=1, replicas=3, failing=frozenset({0, 4}))


@contextmanager
def eager_copies(chance: random.Random) -> Iterator[None]:
    """Who has nothing to do always takes a copy."""

    def first(found: Iterable[Straggler], speed: float) -> Straggler | None:
        # Not the one expected to be last: that goes by real time, and a sweep repeats a history.
        return min(found, key=lambda straggler: straggler.lease.chunk_id, default=None)

    with (
        patch.object(coordinator, "LOOK_EVERY_S", 0.0),
        patch.object(stragglers, "usual_speed", lambda paces: 1.0),
        patch.object(stragglers, "worth_copying", first),
    ):
        yield


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with patch.object(history, "drawn_copies", eager_copies), patch.object(fleet, "SIGTERMS", 0.0):
        yield


def lived(folder: Path, seed: int) -> tuple[Job, Counter[str]]:
    folder.mkdir()
    job = Job(MORE, folder, Machine(), seed)
    live(job)
    kinds = Counter(event["event"] for event in job.events())
    kinds["copies"] = sum(bool(event.get("is_copy")) for event in job.events())
    return job, kinds


def test_of_two_attempts_one_is_committed_and_the_other_discarded(tmp_path: Path) -> None:
    """Whichever comes first, and whether the other is called off in time or too late."""
    total: Counter[str] = Counter()
    outputs = []
    for seed in range(60):
        job, kinds = lived(tmp_path / str(seed), seed)
        assert kinds["chunk_committed"] == 9, "each chunk once"
        outputs.append(job.output())
        first = {(e["chunk_id"], e["epoch"]) for e in job.events() if "committed" in e["event"]}
        copies = {(e["chunk_id"], e["epoch"]) for e in job.events() if e.get("is_copy")}
        kinds["copies first"] = len(first & copies)
        total += kinds
    assert all(output == outputs[0] for output in outputs), "whoever was first, the rows are these"
    assert 0 < total["copies first"] < total["copies"], f"both kinds of winners were seen: {total}"
    assert total["attempt_discarded"] and total["chunk_given_up"], f"both kinds of losers: {total}"


@pytest.mark.timeout(600)
def test_a_crash_anywhere_in_a_job_with_copies(tmp_path: Path) -> None:
    """Killed or cut off, the loser's attempt is left by nobody and taken for nothing.

    Who copies what goes by real time, so that no history comes twice and none can be swept.
    """
    machine, chance, kinds = Machine(), random.Random(5), ("kill", "power cut", "lost")
    outputs, length = [], 0
    for number in range(61):
        place = tmp_path / str(number)
        place.mkdir()
        job = Job(SMALL, place, machine)
        machine.stretches = [[]]
        live(job, [Crash(chance.randint(1, length), kinds[number % 3])] if number else [])
        outputs.append(job.output())
        length = length or len(machine.stretches[0])
    assert all(output == outputs[0] for output in outputs)
    assert sum(machine.crashed.values()) > 40, "most crashes happened"
    assert len(machine.kinds) == 3


def test_a_rival_that_nobody_ended_is_still_refused_by_the_commit_record(tmp_path: Path) -> None:
    """The table ends both leases; without that, the exclusive record is what is left."""
    job = make_job(tmp_path)
    replica = Replica(lambda: job.store, job.plan, job.spec, Script())
    task = ChunkTask(job.plan.chunks[3])
    first, second = (replica.attempt(Lease(3, epoch, epoch, "r"), task) for epoch in (1, 2))
    committer = Committer(job.store, job.plan)
    committer.commit(second, second.epoch)
    with pytest.raises(StaleAttemptError, match="is committed already"):
        committer.commit(first, first.epoch)
    assert [record.attempt.epoch for record in committer.records()] == [2]
    assert job.store.list("_eevp/attempts") == [], "the loser's files are gone"
