"""What a person sees in the Ray dashboard."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_tasks

from eevp_batch.cluster.fleet import Call
from eevp_batch.cluster.job_page import describe, updated
from eevp_batch.cluster.progress import Meter, Progress
from eevp_batch.cluster.ray_names import CALLS, actor_name, job_metadata, job_name
from eevp_batch.records import ChunkStats
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script

RUN_ID = "corpus-demo-0123456789ab"


def progress(rows_done: int = 2560, rows_total: int = 10_000, error: int = 3) -> Progress:
    meter = Meter(ChunkStats(), 0.0, rows_total, 0)
    meter.replica_is_ready(0.0)
    meter.rows_settled = rows_done
    facts = dict.fromkeys(
        ("chunks_total", "chunks_committed", "chunks_leased", "chunks_pending"), 0
    )
    return meter.progress(
        256.0,
        open_rows=0,
        waited_s=0.0,
        storage_s=0.0,
        rows_error=error,
        replicas=1,
        replicas_ready=1,
        is_draining=False,
        **facts,
    )


def test_names_read_well() -> None:
    assert job_name(RUN_ID) == "eevp:corpus-demo"
    assert actor_name(f"{RUN_ID}.89abcdef", "eevp-replica-0.2") == "eevp:corpus-demo/replica-0.2"
    assert actor_name("a.b-c.d-0123.ef", "eevp-replica-11") == "eevp:a.b-c.d/replica-11"
    assert job_metadata(RUN_ID, "s3://bucket/out")["eevp_output"] == "s3://bucket/out"
    assert {*CALLS, "place"} == set(get_args(Call)), "each call of a replica's has a name"


def test_progress_is_one_line() -> None:
    assert describe(progress()) == (
        "2,560 of 10,000 rows (26 %), 3 in error, 0 tokens/s, 12 min left"
    )
    assert describe(progress(0, 0, 0)).startswith("0 of 0 rows (100 %)")


def test_only_a_running_job_is_changed() -> None:
    entry = {"status": "RUNNING", "entrypoint": "x", "metadata": {"owner": "me"}, "message": "old"}
    found = updated(entry, "half", {"eevp_output": "out"})
    assert found == {
        "status": "RUNNING",
        "entrypoint": "x",
        "message": "half",
        "metadata": {"owner": "me", "eevp_output": "out", "eevp_progress": "half"},
    }
    assert updated({**entry, "metadata": None}, "half", {}) is not None
    for status in ("PENDING", "SUCCEEDED", "FAILED", "STOPPED"):
        assert updated({**entry, "status": status}, "half", {}) is None


DRIVER = """
import sys, time
import ray
from eevp_batch.cluster.job_page import JobPage
from tests.cluster.test_ray_names import progress
ray.init(address="auto")
JobPage({"eevp_output": "/out"}).tell(progress())
until = time.monotonic() + 120
while not ray.experimental.internal_kv._internal_kv_get("done") and time.monotonic() < until:
    time.sleep(0.2)
"""


@pytest.fixture
def dashboard_url() -> Iterator[str]:
    """A Ray with a dashboard, whose agent listens on a port of its own: Ray's is one for all."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_agent_listen_port": port}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        yield f"http://{cluster.head_node.webui_url}"
    finally:
        ray.shutdown()
        cluster.shutdown()


def submitted(client: JobSubmissionClient, folder: Path) -> str:
    """A driver that tells its progress and waits until it may end."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    root = Path(__file__).resolve().parent.parent.parent
    env = {"env_vars": {"PYTHONPATH": str(root)}}
    until = time.monotonic() + 300
    while True:
        try:
            job_id: str = client.submit_job(
                entrypoint=f"{sys.executable} {script}", runtime_env=env, metadata={"owner": "me"}
            )
            return job_id
        except RuntimeError as error:  # the node's agent starts last
            assert "No available agent" in str(error) and time.monotonic() < until, error
            time.sleep(1)


def waited_for(client: JobSubmissionClient, job_id: str, is_there: Any) -> Any:
    until = time.monotonic() + 300
    while True:
        found = client.get_job_info(job_id)
        if is_there(found):
            return found
        assert time.monotonic() < until, json.dumps(str(found))
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.timeout(900)  # much of it is waiting for processes to start
def test_the_dashboard_shows_jobs_replicas_and_calls(dashboard_url: str, tmp_path: Path) -> None:
    """A job's replicas and calls by name; a submitted driver's progress, and its end after it."""
    seen: set[str] = set()

    def look(found: Progress) -> None:
        for state in list_actors(address=dashboard_url):
            seen.add(state.name)

    job = make_job(tmp_path, prompts=40, replicas=2)
    job.on_progress = look
    job.run(Script(step_s=0.1))
    assert {"eevp:scripted/replica-0", "eevp:scripted/replica-1"} <= seen
    calls = {task.name for task in list_tasks(dashboard_url, limit=1000)}
    assert {CALLS["ready"], CALLS["process"], CALLS["progress"]} <= calls

    client = JobSubmissionClient(dashboard_url)
    job_id = submitted(client, tmp_path)
    told = waited_for(client, job_id, lambda found: "rows" in (found.message or ""))
    assert told.status == JobStatus.RUNNING and told.message == describe(progress())
    assert told.metadata["eevp_progress"] == told.message
    assert (told.metadata["owner"], told.metadata["eevp_output"]) == ("me", "/out")
    ray.experimental.internal_kv._internal_kv_put("done", "1")
    waited_for(client, job_id, lambda found: found.status == JobStatus.SUCCEEDED)
