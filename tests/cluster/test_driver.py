"""The driver is killed or interrupted; the same job again comes to the same end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.cluster.guard import marked_processes
from eevp_batch.cluster.interrupts import Interrupts
from eevp_batch.cluster.local_ray import LocalRay, local_ray
from eevp_batch.errors import UsageError
from eevp_batch.storage.cancelling import ask_to_end
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script

pytestmark = pytest.mark.ray

OPTIONS: dict[str, Any] = {"prompts": 60, "chunk_rows": 5, "replicas": 2}
SLOW = Script(step_s=0.1, max_resident=4)  # about 5 s of work for two replicas


class Driver:
    """A job in a process of its own."""

    def __init__(self, folder: Path, script: Script, options: dict[str, Any] = OPTIONS) -> None:
        self.job = make_job(folder, **options)
        (folder / "script.pickle").write_bytes(pickle.dumps((options, script)))
        command = [sys.executable, "-m", "tests.cluster.drive", str(folder)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def interrupt(self, number: signal.Signals) -> None:
        """As a terminal does for Ctrl-C: everything that the driver has started gets it too."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def until_committed(self, num_chunks: int) -> None:
        wait_for(lambda: len(self.job.parts()) >= num_chunks or self.process.poll() is not None)
        assert self.process.poll() is None, f"it ended early: {self.end()}"

    def session(self) -> tuple[str, Path]:
        """Marker and folder of its local Ray, from its guard's command line."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            parent = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == self.process.pid and "guard.py" in " ".join(command):
                return command[-3], Path(command[-2])
        raise AssertionError("the driver has no guard")

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(shared_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("undisturbed"), **OPTIONS)
    job.run(Script())
    return job


def assert_resumes(job: Job, undisturbed: Job) -> None:
    """Run the job again: only what was missing is done, and the end is the same."""
    before = job.parts()
    result = job.run(Script())
    assert result.chunks_before == len({Path(name).name for name in before})
    assert before.items() <= job.parts().items(), "a committed part was touched"
    assert job.rows() == undisturbed.rows()
    assert not job.problems()


def test_a_killed_driver_leaves_nothing_running_and_the_job_goes_on(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, SLOW)
    driver.until_committed(3)
    marker, folder = driver.session()
    assert any(marked_processes(marker)), "the marker marks nothing"
    driver.process.kill()
    driver.end()
    wait_for(lambda: not any(marked_processes(marker)) and not folder.exists(), timeout_s=15)
    assert 3 <= len(driver.job.parts()) < 12, "the driver was killed too late to show anything"
    assert_resumes(driver.job, undisturbed)
    assert len(driver.job.events("job_resumed")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path, number: signal.Signals
) -> None:
    driver = Driver(tmp_path, SLOW)
    driver.until_committed(2)
    marker, folder = driver.session()
    driver.interrupt(number)
    code, stderr = driver.end()
    assert code == 130, stderr
    assert not any(marked_processes(marker)) and not folder.exists(), "its Ray was left behind"
    for words in ("same command", "a further interrupt stops at once"):
        assert words in stderr, f"the user is not told how: {stderr}"
    job = driver.job
    (draining,) = job.events("job_draining")
    done = {event["chunk_id"] for event in job.events("chunk_committed")}
    leased = {event["chunk_id"] for event in job.events("chunk_leased")}
    assert leased == done and len(done) < 12, "what was leased is finished, and nothing else begun"
    assert draining["chunks_in_flight"] > 0
    assert len(job.events("job_interrupted")) == 1
    assert_resumes(job, undisturbed)


def test_the_second_signal_ends_it_at_once(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, Script(step_s=0.5, max_resident=4))
    driver.until_committed(1)
    driver.interrupt(signal.SIGINT)
    wait_for(lambda: bool(driver.job.events("job_draining")))
    driver.interrupt(signal.SIGINT)
    code, stderr = driver.end()
    assert code == 130, stderr
    done = {event["chunk_id"] for event in driver.job.events("chunk_committed")}
    leased = {event["chunk_id"] for event in driver.job.events("chunk_leased")}
    assert done < leased, "it waited for what was under way"
    assert_resumes(driver.job, undisturbed)


@pytest.mark.parametrize("drains", [True, False])
def test_a_request_in_the_output_folder_does_what_a_signal_does(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path, drains: bool
) -> None:
    driver = Driver(tmp_path, Script(step_s=0.4, max_resident=4))
    driver.until_committed(1)
    ask_to_end(driver.job.store, drains)
    code, stderr = driver.end()
    assert code == 130, stderr
    done = {event["chunk_id"] for event in driver.job.events("chunk_committed")}
    leased = {event["chunk_id"] for event in driver.job.events("chunk_leased")}
    assert (leased == done and len(done) < 12) if drains else done < leased
    with pytest.raises(UsageError, match="no run of this job is under way"):
        ask_to_end(driver.job.store, drains)
    assert_resumes(driver.job, undisturbed)


def test_who_ends_the_process_soon_lets_it_end_in_order_before() -> None:
    drained: list[bool] = []
    with Interrupts(stop_within_s=0.2) as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.drain_with(lambda: drained.append(True))
        signal.raise_signal(signal.SIGTERM)
        assert drained == [True], "the first signal drains"
        time.sleep(60)
    with Interrupts() as interrupts:
        interrupts.drain_with(lambda: drained.append(True))
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert len(drained) == 2, "without a deadline it waits"


def test_the_local_ray_listens_on_loopback_only(shared_ray: LocalRay) -> None:
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.1", "other machines can reach it"


def test_a_local_ray_within_another_is_the_same(shared_ray: LocalRay) -> None:
    with local_ray(num_cpus=1, dashboard=False) as inner:
        assert inner.dashboard_url is None
    import ray

    assert ray.is_initialized(), "the inner block ended the outer one's Ray"
