"""Ray's head dies under a job: the driver ends, says so, and the job goes on elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from eevp_batch.cluster import head_watch
from eevp_batch.cluster.guard import marked_processes
from eevp_batch.cluster.head_watch import HeadWatch
from eevp_batch.errors import ClusterError
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script
from tests.cluster.test_driver import Driver, wait_for

LONG: dict[str, Any] = {"prompts": 2000, "chunk_rows": 5, "replicas": 2}
SLOW = Script(step_s=0.1, max_resident=4)  # a minute and a half of work


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """A head that only listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_head_that_answers_is_there_and_one_that_is_gone_is_lost(
    port: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_watch, "LOOK_EVERY_S", 0.01)
    watch = HeadWatch(f"127.0.0.1:{port.getsockname()[1]}")
    thread = threading.Thread(target=watch.watch)
    thread.start()
    for _ in range(3):
        port.accept()[0].close()
    watch.check()
    port.close()
    wait_for(lambda: watch.is_lost)
    with pytest.raises(ClusterError, match="the same command goes on from there") as caught:
        watch.check()
    assert caught.value.exit_code == 5
    watch.end()
    thread.join()


HANGING = """
import threading
from eevp_batch.cluster import head_watch
head_watch.LOOK_EVERY_S = head_watch.GRACE_S = 0.01
threading.Thread(target=head_watch.HeadWatch("127.0.0.1:1").watch, daemon=True).start()
threading.Event().wait()  # as some of Ray's calls do
"""


def test_a_driver_that_hangs_without_a_head_is_ended() -> None:
    command = [sys.executable, "-c", HANGING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("Error: the head of the Ray cluster at 127.0.0.1:1 has been gone")


def assert_ended_for_it(driver: Driver) -> None:
    """With the error of a lost cluster, well before Ray's own minute, and resumable."""
    _, stderr = driver.process.communicate(timeout=100)
    assert driver.process.returncode == 5, stderr
    assert "the head of the Ray cluster at" in stderr and "same command" in stderr
    (failed,) = driver.job.events("job_failed")
    assert failed["reason"].startswith("ClusterError: the head")
    parts = driver.job.parts()
    assert 3 <= len({Path(name).name for name in parts}) < 400
    committed = {event["chunk_id"] for event in driver.job.events("chunk_committed")}
    assert {int(Path(name).name) for name in parts} == committed, "nothing is there by half"


@pytest.mark.ray
@pytest.mark.slow
def test_the_head_of_a_local_ray_dies(tmp_path: Path) -> None:
    driver = Driver(tmp_path, SLOW, LONG)
    driver.until_committed(3)
    marker, folder = driver.session()
    (head,) = [pid for pid in marked_processes(marker) if command_of(pid).endswith("gcs_server")]
    os.kill(head, signal.SIGKILL)
    assert_ended_for_it(driver)
    wait_for(lambda: not any(marked_processes(marker)) and not folder.exists(), timeout_s=30)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[0]


@pytest.mark.ray
@pytest.mark.slow
def test_the_head_of_a_cluster_dies_and_the_job_goes_on_elsewhere(tmp_path: Path) -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        driver = Driver(tmp_path, SLOW, {**LONG, "cluster": {"address": cluster.address}})
        driver.until_committed(3)
        cluster.head_node.kill_gcs_server()
        assert_ended_for_it(driver)
    finally:
        cluster.shutdown()
    before = driver.job.parts()
    job = make_job(tmp_path, **LONG)
    assert job.run(Script()).totals.rows_ok == LONG["prompts"]
    assert before.items() <= job.parts().items(), "a committed part was touched"
    assert not job.problems()
