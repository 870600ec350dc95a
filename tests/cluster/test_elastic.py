"""Nodes come and go, and the job goes on with those that are there: on several real raylets."""

from __future__ import annotations

import gc
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from eevp_batch.errors import JobFailedError
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script
from tests.cluster.story import Story, check_whole

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
        del cluster
        with warnings.catch_warnings():  # Ray's nodes leave sockets and processes unclosed
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def drain(node_id: str) -> None:
    """What an autoscaler does with a node that will be taken away."""
    deadline_ms = int((time.time() + 600) * 1000)
    client: Any = ray._private.worker.global_worker.gcs_client
    accepted, why = client.drain_node(node_id, PREEMPTION, "taken away", deadline_ms)
    assert accepted, why


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_grows_and_shrinks_with_its_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """One node, then two; the first is drained, the second gets SIGTERM, the third is killed.

    However long that takes, there is work until then; afterwards the rest is done in no time.
    """
    nodes = [cluster.add_node(num_cpus=1)]
    limits = {"address": cluster.address, "replicas": {"min": 1, "max": 2}}
    job, hurry = make_job(tmp_path, prompts=4000, cluster=limits), tmp_path / "hurry"
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
    story.once(lambda: story.num("replica_ready") == 4, hurry.touch)
    result = job.run(Script(step_s=0.1, max_resident=2, hurry=str(hurry)))
    assert story.is_over, "the job was done before everything had happened"
    ready = [event["node_id"] for event in job.events("replica_ready")]
    assert ready == [node.node_id for node in nodes], "each node got a replica as it came"
    left = [event["reason"] for event in job.events("replica_left")]
    assert left[0] == "its process was told to end" and "received SIGTERM" in left[1]
    assert (result.recoveries.replicas_left, result.recoveries.replica_deaths) == (2, 1)
    check_whole(job, 4000)


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
    assert len(job.events("replica_placed")) == 2, "one in each run"
