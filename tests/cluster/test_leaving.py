"""Replicas are told to end, or are slow and outrun by others: the job goes on, on real Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from eevp_batch.cluster.local_ray import LocalRay
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script
from tests.cluster.story import Story, check_whole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


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

    story.once(lambda: any(pids.iterdir()), lambda: None)
    story.once(lambda: True, end_replica)  # a second later, when it hears signals
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
