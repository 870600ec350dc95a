"""What the coordinator holds and does for a chunk does not depend on how many are done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.coordinator import Coordinator
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet, Resources
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.cluster.phases import Phases
from eevp_batch.records import ChunkStats
from eevp_batch.storage.commit import Attempt, CommitRecord, Committer
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script

pytestmark = pytest.mark.ray

# The plan is as large as the job from the start; the rest belongs to other rooms or to Ray.
NOT_OURS = {"_plan", "_spec", "_committer", "_events", "_arguments", "_actor", "handle"}


def count_objects(root: Any) -> int:
    """Objects that can be reached from `root` through attributes and containers."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (int, float, str, type)) or callable(thing):
            continue
        seen.add(id(thing))
        waiting += _parts(thing)
    return len(seen)


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, (list, tuple, set, frozenset)) or type(thing).__name__ == "deque":
        return list(thing)
    names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
    return [getattr(thing, name) for name in names if name not in NOT_OURS]


class CountingCommitter(Committer):
    """Counts the coordinator's objects after each commit."""

    coordinator: Coordinator
    counts: list[int]

    def commit(self, attempt: Attempt, current_epoch: int) -> CommitRecord:
        record = super().commit(attempt, current_epoch)
        self.counts.append(count_objects(self.coordinator))
        return record


def test_what_the_coordinator_holds_does_not_grow(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts=600, chunk_rows=3)
    committer = CountingCommitter(job.store, job.plan)
    committer.counts = []
    fleet = Fleet(
        namespace=job.plan.run_id,
        size=2,
        resources=Resources(num_cpus=1, num_gpus=0),
        arguments=(Script().build, job.spec, job.plan, job.store.text),
        stderr_tail=shared_ray.tail,
    )
    coordinator = Coordinator(
        spec=job.spec,
        plan=job.plan,
        fleet=fleet,
        committer=committer,
        events=EventLog(job.store),
        backlog=Backlog(job.plan, range(200), 200, job.spec.run.max_attempts),
        num_done=0,
        totals=ChunkStats(),
        on_progress=job.progress.append,
        on_message=job.messages.append,
        phases=Phases(job.spec, job.plan, job.store),
    )
    committer.coordinator = coordinator
    try:
        with committer.lock():
            coordinator.run()
    finally:
        fleet.close()
    counts = committer.counts
    assert len(counts) == 200
    early, late = max(counts[20:60]), max(counts[-40:])
    # One look at progress more or less in its window of time; 180 chunks would leave 180 objects.
    assert late <= early + 30, f"the coordinator grew from {early} to {late} objects"
    assert coordinator.totals.rows == 600
