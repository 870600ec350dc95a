"""What fails around the rows: engines that hang, Ray without room, full disks, clocks that jump."""

from __future__ import annotations

import ast
import itertools
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from eevp_batch.cluster.attached_ray import attached_ray
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.fleet import Resources, Slot
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.cluster.news import memory_shortage
from eevp_batch.cluster.progress import Progress
from eevp_batch.cluster.stall import StallWatch, describe
from eevp_batch.cluster.watchdog import EXIT_CODE
from eevp_batch.errors import ClusterError, JobFailedError
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script

PACKAGE = Path(__file__).resolve().parents[2] / "eevp_batch"

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
    result = job.run(script, no_progress_timeout_s=15.0)
    (dead,) = job.events("replica_dead")
    assert "eevp-replica-0 hangs: it runs a step for more than 5 s" in dead["reason"]
    assert "scripted.py" in dead["reason"], "the place is told"
    assert "when last heard of, it: runs a step, for" in dead["reason"]
    assert result.recoveries.replica_deaths == 1 and result.totals.rows_ok == 60
    assert not job.problems()


@pytest.mark.ray
def test_a_job_that_stands_still_names_who_is_stuck(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, replicas=1)
    with pytest.raises(JobFailedError, match="no token came for") as caught:
        job.run(Script(unreadable=True), no_progress_timeout_s=12.0)
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
    job = make_job(tmp_path, replicas=1, cluster={"placement_timeout_s": 3.0})
    try:
        with pytest.raises(JobFailedError, match="a place for 0 of the 1 replicas") as found:
            job.run(Script(), no_progress_timeout_s=1.0)  # which counts once there is a place
    finally:
        ray.kill(actor)
    assert "each 1 CPUs and 0 GPUs on one node; free on its nodes: 0 CPUs" in str(found.value)


@pytest.mark.ray
def test_a_shortage_of_memory_is_told_once(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, replicas=1)
    result = job.run(Script(shortages=2, step_s=0.02, max_resident=2))
    assert result.recoveries.memory_shortages == 2
    (event,) = job.events("memory_shortage")
    assert (event["replica"], event["steps"], event["max_resident"]) == ("eevp-replica-0", 2, 2)
    assert sum("ran out of memory" in message for message in job.messages) == 1
    before, now = LoopProgress(shortages=1), LoopProgress(shortages=4, max_resident=48)
    told = memory_shortage("r", before, now)
    assert told is not None and told.fields["steps"] == 3, "what was told is not told again"
    assert memory_shortage("r", now, now) is None


def test_what_moves_is_not_stuck_and_a_pause_is_not_a_stall() -> None:
    watch = StallWatch(10.0, lambda: "who")
    for second in range(0, 40, 2):
        watch.look(replace(STILL, elapsed_s=float(second), tokens=second))
    watch.look(replace(STILL, elapsed_s=5_000.0, tokens=38))  # the machine slept
    watch.look(replace(STILL, elapsed_s=5_004.0, tokens=38))
    with pytest.raises(JobFailedError, match="came for 10 s"):
        watch.look(replace(STILL, elapsed_s=5_005.0, tokens=38))


def test_every_replica_says_what_it_does() -> None:
    slots = [Slot(index, starts=1, place=object()) for index in range(11)]
    slots[1].handle, slots[2].handle = object(), object()
    slots[0].place = slots[4].place = None
    slots[2].progress = replace(slots[2].progress, doing="runs a step, for 700 s")
    slots[0].deaths_in_a_row = 3
    lease = Lease(7, 1, 1, "eevp-replica-2")
    held = {"eevp-replica-2": [lease]}
    found = describe(slots, lambda name: held.get(name, []), Resources(2, 1)).splitlines()
    assert found[:4] == [
        "  eevp-replica-0: died 3 times in a row and waits for its next start",
        "  eevp-replica-1: has not come up: Ray is still starting its process",
        "  eevp-replica-2 with chunk 00007: runs a step, for 700 s",
        "  eevp-replica-3: has no place: Ray has no node with 2 CPUs and 1 GPUs to spare",
    ]
    assert "eevp-replica-4" not in "".join(found), "nobody is to be there"
    assert found[-1] == "  and 2 more", "a hundred replicas do not fill the screen"


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def test_ray_repeats_nothing_of_its_own() -> None:
    """The coordinator owns every retry, so both counts are written out wherever Ray is told."""
    found = [call for path in PACKAGE.rglob("*.py") for call in calls(path)]
    names = [ast.unparse(call.func) for call in found]
    remote = [name for name in names if name == "ray.remote"]
    options = [c for c in found if isinstance(c.func, ast.Attribute) and c.func.attr == "options"]
    # A single call of a replica's may be given a name; its counts are the actor's.
    options = [c for c in options if [k.arg for k in c.keywords] != ["name"]]
    assert len(remote) == len(options), "what is started without options has Ray's defaults"
    for call in options:
        counts = {k.arg: ast.unparse(k.value) for k in call.keywords}
        actor = {"max_restarts": "0", "max_task_retries": "0"}
        assert counts.items() >= actor.items() or counts.get("max_retries") == "0"


def test_the_wall_clock_decides_nothing() -> None:
    """It may jump. It dates events, attempts and progress; nothing is computed from it."""
    dates = {
        path.name
        for path in (PACKAGE / "cluster").glob("*.py")
        for call in calls(path)
        if ast.unparse(call.func) in ("time.time", "time.time_ns", "datetime.now")
    }
    assert dates == {"events.py", "metrics.py", "replica.py"}


@pytest.mark.ray
def test_a_clock_that_jumps_changes_nothing(
    shared_ray: LocalRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, whole = random.Random(3), time.time
    script = Script(killing=frozenset({31}), once=str(tmp_path / "killed"), step_s=0.005)
    with monkeypatch.context() as jumping:
        jumping.setattr(time, "time", lambda: whole() + rng.uniform(-1e6, 1e6))
        job = make_job(tmp_path, replicas=1)
        result = job.run(script, no_progress_timeout_s=60.0)
    assert result.recoveries.replica_deaths == 1 and result.totals.rows_ok == 60
    stamps = [event["unix_s"] for event in job.events("chunk_committed")]
    assert any(later < earlier for earlier, later in itertools.pairwise(stamps)), "it went back"
    assert not job.problems() and [row["row_id"] for row in job.rows()] == list(range(60))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A filesystem of its own on a folder."""
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        pytest.skip("this user may not mount a filesystem")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: object) -> int:
    command = ["mount", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.mark.ray
def test_a_full_disk_and_a_read_only_one_are_one_clear_error_each(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    """With room again the same job goes on; nothing that is there is half-written."""
    disk = tmp_path / "disk"
    with small_disk(disk, "512k"):
        job = make_job(tmp_path, prompts=500, out="disk/out")
        with pytest.raises(JobFailedError, match="No space left on device") as caught:
            job.run(Script())
        assert "Traceback" not in str(caught.value), "what the user can do nothing with"
        assert not (job.out / "_SUCCESS").exists()
        parts = job.parts()
        assert parts, "it had begun"
        for path in (job.out / "data").iterdir():
            assert pq.read_table(path).num_rows == 5, "a part is there whole or not at all"
        assert not mount("-o", "remount,ro", disk)
        with pytest.raises(JobFailedError, match="Read-only file system"):
            job.run(Script())
        assert not mount("-o", "remount,rw,size=64m", disk)
        result = job.run(Script())
        assert result.chunks_before >= len(parts) and result.totals.rows_ok == 500
        assert parts.items() <= job.parts().items(), "a committed part was touched"
        assert not job.problems()


def test_a_cluster_that_cannot_be_reached_is_said_at_once() -> None:
    with pytest.raises(ClusterError, match="cannot be joined") as caught, attached_ray("[::1]:1"):
        pass
    assert caught.value.exit_code == 5
