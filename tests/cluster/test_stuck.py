"""Nothing moves: a replica whose engine hangs is replaced, and a job that stands still says why."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from eevp_batch.cluster.fleet import Resources, Slot
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.cluster.progress import Progress
from eevp_batch.cluster.stall import StallWatch, describe
from eevp_batch.cluster.watchdog import EXIT_CODE
from eevp_batch.errors import JobFailedError
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script

STILL = Progress(
    rows_total=60,
    rows_done=10,
    rows_error=0,
    tokens=100,
    tokens_per_s=None,
    mean_exit_layer=None,
    eta_s=None,
    elapsed_s=0.0,
    replicas=1,
    replicas_ready=1,
    chunks_total=12,
    chunks_committed=2,
    chunks_leased=1,
    chunks_pending=9,
    coordinator_s=0.0,
    storage_s=0.0,
    is_draining=False,
)

HUNG = """
import ctypes, sys, threading, time
from eevp_batch.cluster.watchdog import Pulse, watch
pulse = Pulse("builds its engine")
watch("eevp-replica-7", pulse, float(sys.argv[2]))
time.sleep(1.0)  # not bounded: nothing happens
pulse.begin("runs a step", is_bounded=True)
if sys.argv[1] == "alone":
    ctypes.PyDLL(None).sleep(60)  # lets no other thread run, as some kernels do
threading.Event().wait(60)
"""


@pytest.mark.parametrize(
    ("how", "timeout_s", "code", "said"),
    [("waiting", 1.5, EXIT_CODE, "eevp-replica-7 hangs: it runs a step"), ("alone", 3, 1, "File")],
)
def test_the_watchdog_ends_a_process_that_hangs(
    how: str, timeout_s: float, code: int, said: str
) -> None:
    command = [sys.executable, "-c", HUNG, how, str(timeout_s)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == code, found.stderr
    assert said in found.stderr, "its last words say where it stood"
    assert re.search(r"line (9|10)\b", found.stderr), "and at which line"


@pytest.mark.ray
def test_a_replica_whose_engine_hangs_is_replaced(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, replicas=1)
    script = Script(hanging=frozenset({31}), once=str(tmp_path / "hung"))
    result = job.run(script, no_progress_timeout_s=6.0)
    (dead,) = job.events("replica_dead")
    assert "eevp-replica-0 hangs: it runs a step for more than 2 s" in dead["reason"]
    assert "scripted.py" in dead["reason"], "the place is told"
    assert "when last heard of, it: runs a step, for" in dead["reason"]
    assert result.recoveries.replica_deaths == 1 and result.totals.rows_ok == 60
    assert not job.problems()


@pytest.mark.ray
def test_a_job_that_stands_still_names_who_is_stuck(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, replicas=1)
    with pytest.raises(JobFailedError, match="no token came for") as caught:
        job.run(Script(unreadable=True), no_progress_timeout_s=2.0)
    assert "eevp-replica-0 with chunk 00000, 00001" in str(caught.value)
    assert "has nothing to generate, for" in str(caught.value), "what it last did"
    (failed,) = job.events("job_failed")
    assert "run.no_progress_timeout_s" in failed["reason"]
    assert job.run(Script()).totals.rows_ok == 60, "the same job goes on"


@pytest.mark.ray
def test_a_replica_that_ray_cannot_start_is_named(shared_ray: LocalRay, tmp_path: Path) -> None:
    class Squatter:
        def here(self) -> bool:
            return True

    actor = ray.remote(Squatter).options(num_cpus=4, max_restarts=0, max_task_retries=0).remote()
    assert ray.get(actor.here.remote())
    job = make_job(tmp_path, replicas=1)
    try:
        with pytest.raises(JobFailedError, match="eevp-replica-0: was not started by Ray") as found:
            job.run(Script(), no_progress_timeout_s=2.0)
    finally:
        ray.kill(actor)
    assert "1 CPUs and 0 GPUs" in str(found.value)


def test_what_moves_is_not_stuck_and_a_pause_is_not_a_stall() -> None:
    watch = StallWatch(10.0, lambda: "who")
    for second in range(0, 40, 2):
        watch.look(replace(STILL, elapsed_s=float(second), tokens=second))
    watch.look(replace(STILL, elapsed_s=5_000.0, tokens=38))  # the machine slept
    watch.look(replace(STILL, elapsed_s=5_004.0, tokens=38))
    with pytest.raises(JobFailedError, match="came for 10 s"):
        watch.look(replace(STILL, elapsed_s=5_005.0, tokens=38))


def test_every_replica_says_what_it_does() -> None:
    slots = [Slot(index, starts=1) for index in range(10)]
    slots[1].handle, slots[2].handle = object(), object()
    slots[2].progress = replace(slots[2].progress, doing="runs a step, for 700 s")
    slots[0].deaths_in_a_row = 3
    lease = Lease(7, 1, 1, "eevp-replica-2")
    held = {"eevp-replica-2": [lease]}
    found = describe(slots, lambda name: held.get(name, []), Resources(2, 1)).splitlines()
    assert found[:3] == [
        "  eevp-replica-0: died 3 times in a row and waits for its next start",
        "  eevp-replica-1: was not started by Ray, which finds no node with 2 CPUs and 1 GPUs to "
        "spare",
        "  eevp-replica-2 with chunk 00007: runs a step, for 700 s",
    ]
    assert found[-1] == "  and 2 more", "a hundred replicas do not fill the screen"
