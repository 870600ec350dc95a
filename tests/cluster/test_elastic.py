"""Nodes come and go, replicas are told to end, slow ones are outrun: all on real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.cluster.progress import Progress
from eevp_batch.errors import JobFailedError
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script, exits_of

pytestmark = pytest.mark.ray

PREEMPTION = 2
"""Ray's number for why a node is drained."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs; nodes are added by the test."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Story:
    """Things to do one after the other, each once what it waits for is in the event log."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        job.on_progress = self._look

    def once(self, is_time: Callable[[], bool], act: Callable[[], None]) -> None:
        self._steps.append((is_time, act))

    def num(self, kind: str) -> int:
        return len(self.job.events(kind))

    @property
    def is_over(self) -> bool:
        return not self._steps

    def _look(self, progress: Progress) -> None:
        if self._steps and self._steps[0][0]():
            self._steps.pop(0)[1]()


def check_whole(job: Job, num_rows: int) -> None:
    """Every row once, as its id wants it, and as the first attempt at its chunk or a later one."""
    assert not job.problems()
    assert [row["row_id"] for row in job.rows()] == list(range(num_rows))
    for row in job.rows():
        assert row["token_ids"] == [exit.token_id for exit in exits_of(row["row_id"], 0)]


def drain(node_id: str) -> None:
    """What an autoscaler does with a node that will be taken away."""
    deadline_ms = int((time.time() + 600) * 1000)
    client: Any = ray._private.worker.global_worker.gcs_client
    accepted, why = client.drain_node(node_id, PREEMPTION, "taken away", deadline_ms)
    assert accepted, why


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_grows_and_shrinks_with_its_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """One node, then two; the first is drained, the second gets SIGTERM, the third is killed."""
    nodes = [cluster.add_node(num_cpus=1)]
    limits = {"address": cluster.address, "replicas": {"min": 1, "max": 2}}
    job = make_job(tmp_path, prompts=400, cluster=limits)
    story = Story(job)

    def add_node() -> None:
        nodes.append(cluster.add_node(num_cpus=1))

    def end_raylet() -> None:
        nodes[1].all_processes["raylet"][0].process.send_signal(signal.SIGTERM)

    story.once(lambda: story.num("chunk_committed") > 1, add_node)
    story.once(lambda: story.num("replica_ready") == 2, lambda: drain(nodes[0].node_id))
    story.once(lambda: story.num("replica_left") == 1, add_node)
    story.once(lambda: story.num("replica_ready") == 3, end_raylet)
    story.once(lambda: story.num("replica_left") == 2, lambda: cluster.remove_node(nodes[2], False))
    story.once(lambda: story.num("replica_dead") == 1, add_node)
    result = job.run(Script(step_s=0.05, max_resident=2))
    assert story.is_over, "the job was done before everything had happened"
    ready = [event["node_id"] for event in job.events("replica_ready")]
    assert ready == [node.node_id for node in nodes], "each node got a replica as it came"
    left = [event["reason"] for event in job.events("replica_left")]
    assert left[0] == "its process was told to end" and "received SIGTERM" in left[1]
    assert (result.recoveries.replicas_left, result.recoveries.replica_deaths) == (2, 1)
    check_whole(job, 400)


@pytest.mark.timeout(300)
def test_a_job_begins_with_fewer_and_fails_below_its_least(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    settings = {"address": cluster.address, "placement_timeout_s": 4.0}
    job = make_job(tmp_path, prompts=400, cluster={**settings, "replicas": {"min": 2, "max": 3}})
    with pytest.raises(JobFailedError, match="a place for 1 of the 2 replicas that the job needs"):
        job.run(Script(step_s=0.1, max_resident=1))
    limits = job.spec.cluster.model_copy(update={"replicas": 3})
    job.spec = job.spec.model_copy(update={"cluster": limits})
    result = job.run(Script())
    assert result.totals.rows_ok == 400, "the same job goes on, on one replica of three"
    assert {event["replica"] for event in job.events("replica_ready")} == {"eevp-replica-0"}


def test_sigterm_makes_a_replica_give_its_chunks_back(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts=120, replicas=1)
    story = Story(job)

    def end_replica() -> None:
        os.kill(job.events("replica_ready")[-1]["pid"], signal.SIGTERM)

    story.once(lambda: story.num("chunk_committed") > 0, end_replica)
    result = job.run(Script(step_s=0.2, max_resident=5))
    assert story.is_over
    assert (result.recoveries.replicas_left, result.recoveries.replica_deaths) == (1, 0)
    given_up = [event for event in job.events("chunk_given_up") if event["is_leaving"]]
    (left,) = job.events("replica_left")
    assert given_up and left["replica"] == "eevp-replica-0"
    attempts = {event["attempt"] for event in job.events("chunk_leased")}
    assert attempts == {1}, "no attempt was used up"
    check_whole(job, 120)


def test_a_replica_that_is_told_to_end_while_it_starts_is_replaced(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    job = make_job(tmp_path, replicas=1)
    pids = tmp_path / "pids"
    pids.mkdir()
    story = Story(job)

    def end_replica() -> None:
        (found,) = pids.iterdir()
        os.kill(int(found.name.split("-")[0]), signal.SIGTERM)

    story.once(lambda: any(pids.iterdir()), end_replica)
    result = job.run(Script(build_s=5.0, counting=str(pids)))
    assert (result.recoveries.replicas_left, result.recoveries.replica_deaths) == (1, 0)
    assert len(list(pids.iterdir())) == 2
    check_whole(job, 60)


def test_a_slow_replica_is_outrun(shared_ray: LocalRay, tmp_path: Path) -> None:
    """It holds the last chunks; another one, idle by then, does them as well and is first."""
    job = make_job(tmp_path, replicas=2)
    result = job.run(Script(slow_s=4.0, once=str(tmp_path / "slow"), step_s=0.01))
    found = result.recoveries
    assert 1 <= found.copies_first <= found.chunks_copied
    copies = [event for event in job.events("chunk_leased") if event.get("is_copy")]
    assert len(copies) == found.chunks_copied
    first = {(e["chunk_id"], e["epoch"]) for e in job.events("chunk_committed")}
    assert sum((e["chunk_id"], e["epoch"]) in first for e in copies) == found.copies_first
    assert {event["attempt"] for event in copies} == {2}
    assert job.progress[-1].rows_done == 60
    assert not list((job.out / "_eevp/attempts").iterdir()), "the loser's attempt is gone"
    check_whole(job, 60)
