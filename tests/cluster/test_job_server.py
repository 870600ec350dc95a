"""Jobs on a cluster of three raylets, through its job server: one node goes, others' jobs stay."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.nodes import MODEL_LINE, Nodes, events, wait_for, write_job


def test_a_cluster_that_is_not_there_or_no_cluster_is_said_at_once(
    tmp_path: Path, tiny_llama: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    job = write_job(tmp_path, "nowhere", tiny_llama, f"http://127.0.0.1:{free}", 1)
    command = [sys.executable, "-m", "eevp_batch", "submit", str(job)]
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
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    job = write_job(nodes_folder, "refused", tiny_llama, nodes.url, 1)
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
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    """The first loses a replica and ends; the second is drained, resumed, and ends as well."""
    first = write_job(nodes_folder, "first", tiny_llama, nodes.url, 2)
    second = write_job(nodes_folder, "second", tiny_llama, nodes.url, 1)
    run_a, run_b = (nodes.cli("submit", "--no-wait", job)[1].strip() for job in (first, second))
    assert run_a.startswith("first-") and run_b.startswith("second-")
    out_a, out_b = nodes_folder / "nfs" / "first", nodes_folder / "nfs" / "second"
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
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    runs = {run["name"]: run for run in json.loads(nodes.cli("list", "--json")[1])["runs"]}
    first, second = runs["first"], runs["second"]
    assert (first["state"], second["state"]) == ("done", "done")
    assert first["progress"].startswith("400 of 400 rows (100 %)")
    assert (first["output"], first["cluster"]) == (str(nodes_folder / "nfs" / "first"), nodes.url)
    assert "actor_name:Replica" in nodes.cli("logs", "--replica", 0, first["run_id"])[1]
    code, _, said = nodes.cli("logs", "--replica", 9, first["run_id"])
    assert code == 2 and "--replica: found 9; allowed: those of first-" in said, said

    third = write_job(nodes_folder, "third", tiny_llama, nodes.url, 1)
    run = nodes.cli("submit", "--no-wait", third)[1].strip()
    wait_for(lambda: events(nodes_folder / "nfs" / "third", "chunk_committed"))
    assert nodes.cli("cancel", run)[0] == 0
    code, _, said = nodes.cli("logs", "-f", run)
    listed = json.loads(nodes.cli("list", "--json")[1])["runs"]
    assert [r["state"] for r in listed if r["run_id"] == run] == ["interrupted"]
    (ended,) = events(nodes_folder / "nfs" / "third", "job_interrupted")
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
