"""Jobs on a cluster of three raylets, through its job server: one node goes, others' jobs stay."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 400
MODEL_LINE = 3  # in the job file
Cli = Callable[..., tuple[int, str, str]]


class Nodes:
    """The cluster, in a process of its own; its environment lets this test's commands in."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_STATE_HOME": str(folder / "state"),
            # The entry point is what `python` means on a node; the package comes with the job.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.three_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.url = str(json.loads(self._line())["url"])

    def remove_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("remove\n")
        self.process.stdin.flush()
        assert self._line() == "removed\n"

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()  # which ends the cluster
        self.process.wait(timeout=120)
        self.process.stdout.close()

    def cli(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        found = subprocess.run(
            [sys.executable, "-m", "eevp_batch.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
            timeout=400,
        )
        return found.returncode, found.stdout, found.stderr

    def _line(self) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith(("{", "removed")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    cluster = Nodes(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def write_job(folder: Path, name: str, model: Path, url: str, replicas: int) -> Path:
    """A job whose prompts lie where no node looks, and whose output they all see."""
    home = folder / name
    home.mkdir()
    rows = range(NUM_ROWS)
    table = pa.table({"id": list(rows), "prompt": [f"{name} fox {row}" for row in rows]})
    pq.write_table(table, home / "in.parquet")
    (folder / "nfs").mkdir(exist_ok=True)
    job: dict[str, Any] = {
        "name": name,
        "input": {"path": "in.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "sampling": {"max_new_tokens": 32},
        "exit": {"threshold": 0.2},
        "engine": {"max_batch": 1, "max_resident": 2},  # some seconds of work, few leases
        "run": {"chunk_rows": 5},
        "cluster": {
            "address": url,
            "replicas": replicas,
            "cpus_per_replica": 1,
            "shared_paths": [str(folder / "nfs"), str(model)],
        },
        "output": {"path": str(folder / "nfs" / name)},
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in job.items()]
    (home / "job.yaml").write_text("\n".join(lines) + "\n")
    assert yaml.safe_load((home / "job.yaml").read_text()) == job
    return home / "job.yaml"


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    path = out / "_eevp" / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = list(map(json.loads, lines))
    assert not [event for event in found if event["event"] == "job_failed"], found[-1]
    return [event for event in found if event["event"] == kind]


def wait_for(condition: Callable[[], object], timeout_s: float = 300.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not come to pass in time"
        time.sleep(0.1)


def test_a_cluster_that_is_not_there_or_no_cluster_is_said_at_once(
    tmp_path: Path, tiny_llama: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    job = write_job(tmp_path, "nowhere", tiny_llama, f"http://127.0.0.1:{free}", 1)
    command = [sys.executable, "-m", "eevp_batch.cli", "submit", str(job)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 5, found.stderr
    assert (
        f"cluster.address 'http://127.0.0.1:{free}': the Ray cluster cannot be re" in found.stderr
    )
    assert not (tmp_path / "nfs" / "nowhere").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_cannot_be_submitted_is_refused_before_anything_starts(
    nodes: Nodes, folder: Path, tiny_llama: Path
) -> None:
    job = write_job(folder, "refused", tiny_llama, nodes.url, 1)
    code, _, said = nodes.cli("submit", job, RAY_AUTH_TOKEN="f" * 64)
    assert (code, "the Ray cluster refused us" in said) == (5, True), said
    assert "RAY_AUTH_TOKEN_PATH" in said, "and what to do"
    code, _, said = nodes.cli("submit", job, "--set", "cluster.shared_paths=[]")
    assert code == 2 and f"{job}:{MODEL_LINE}: model.path: found {tiny_llama}" in said, said
    code, _, said = nodes.cli("submit", job, "--set", "output.path=out")
    assert code == 2 and "--set: output.path: found" in said and "shared_paths" in said, said
    code, _, said = nodes.cli("submit", job, "--set", "cluster.env=[EEVP_UNSET]")
    assert code == 2 and "cluster.env[0]: found EEVP_UNSET" in said, said
    assert json.loads(nodes.cli("list", "--json", "--address", nodes.url)[1]) == {"runs": []}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_jobs_share_a_cluster_and_one_node_goes(
    nodes: Nodes, folder: Path, tiny_llama: Path
) -> None:
    """The first loses a replica and ends; the second is drained, resumed, and ends as well."""
    first = write_job(folder, "first", tiny_llama, nodes.url, 2)
    second = write_job(folder, "second", tiny_llama, nodes.url, 1)
    run_a, run_b = (nodes.cli("submit", "--no-wait", job)[1].strip() for job in (first, second))
    assert run_a.startswith("first-") and run_b.startswith("second-")
    out_a, out_b = folder / "nfs" / "first", folder / "nfs" / "second"
    wait_for(lambda: len(events(out_a, "chunk_committed")) >= 3)
    nodes.remove_one()
    wait_for(lambda: events(out_b, "chunk_committed"))
    code, _, said = nodes.cli("submit", second)
    assert code == 2 and f"{run_b} on {nodes.url} is working on it" in said, "and not twice"
    assert nodes.cli("cancel", "--drain", run_b)[0] == 0

    code, log, said = nodes.cli("logs", "-f", run_a)
    assert code == 0 and "first-" in log and "400 ok" in log, log + said
    assert nodes.cli("verify", out_a)[0] == 0
    wait_for(lambda: events(out_b, "job_interrupted"))
    assert events(out_b, "job_draining"), "what was under way was finished"
    begun = {event["chunk_id"] for event in events(out_b, "chunk_leased")}
    done = {event["chunk_id"] for event in events(out_b, "chunk_committed")}
    assert begun - done <= {c for event in events(out_b, "replica_dead") for c in event["chunks"]}

    code, _, said = nodes.cli("submit", second)
    assert code == 0 and f"{run_b} resumes" in said, said
    assert nodes.cli("verify", out_b)[0] == 0
    (resumed,) = events(out_b, "job_resumed")
    assert resumed["submission_id"] == f"{run_b}.2", "Ray takes an id once"
    names = [{event["replica"] for event in events(o, "replica_ready")} for o in (out_a, out_b)]
    assert names[0] & names[1], "replicas of two jobs have the same names, in their own namespaces"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_found_by_its_id_on_the_cluster_and_in_storage_when_that_has_gone(
    nodes: Nodes, folder: Path, tiny_llama: Path
) -> None:
    runs = {run["name"]: run for run in json.loads(nodes.cli("list", "--json")[1])["runs"]}
    first, second = runs["first"], runs["second"]
    assert (first["state"], second["state"]) == ("done", "done")
    assert first["progress"].startswith("400 of 400 rows (100 %)")
    assert (first["output"], first["cluster"]) == (str(folder / "nfs" / "first"), nodes.url)
    assert "actor_name:Replica" in nodes.cli("logs", "--replica", 0, first["run_id"])[1]
    code, _, said = nodes.cli("logs", "--replica", 9, first["run_id"])
    assert code == 2 and "--replica: found 9; allowed: those of first-" in said, said

    third = write_job(folder, "third", tiny_llama, nodes.url, 1)
    run = nodes.cli("submit", "--no-wait", third)[1].strip()
    wait_for(lambda: events(folder / "nfs" / "third", "chunk_committed"))
    assert nodes.cli("cancel", run)[0] == 0
    code, _, said = nodes.cli("logs", "-f", run)
    listed = json.loads(nodes.cli("list", "--json")[1])["runs"]
    assert [r["state"] for r in listed if r["run_id"] == run] == ["interrupted"]
    (ended,) = events(folder / "nfs" / "third", "job_interrupted")
    assert ended["chunks_committed"] >= 1

    nodes.close()
    code, text, _ = nodes.cli("status", run)
    assert code == 0 and text.startswith(f"{run}: interrupted"), text
    code, text, said = nodes.cli("logs", first["output"])
    assert code == 0 and "cannot be reached" in said and "job_finished" in text, text + said
    code, text, _ = nodes.cli("logs", "--replica", 0, first["run_id"])
    assert code == 0 and {line.split()[2] for line in text.splitlines()} >= {"replica_ready"}
    states = {r["run_id"]: r["state"] for r in json.loads(nodes.cli("list", "--json")[1])["runs"]}
    assert states[first["run_id"]] == "done" and states[run] == "interrupted"
    code, _, said = nodes.cli("cancel", run)
    assert code == 2 and "no run of this job is under way" in said, said
