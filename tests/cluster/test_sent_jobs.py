"""What a job says of the cluster that it is sent to: how to reach it, and what runs where.

One cluster of three raylets.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests

from tests.cluster.nodes import Nodes, events, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_ROWS = 40


def driver_node(nodes: Nodes, submission_id: str) -> str:
    """The node that a job's entry point ran on."""
    headers = {"Authorization": f"Bearer {nodes.environment['RAY_AUTH_TOKEN']}"}
    answer = requests.get(f"{nodes.url}/api/jobs/{submission_id}", headers=headers, timeout=60)
    return str(answer.json()["driver_node_id"])


def test_a_job_comes_through_ray_client_to_the_node_it_asks_for_and_its_errors_are_retried(
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    """Time runs out for every row of the first run, for none of the second."""
    job = write_job(nodes_folder, "retried", tiny_llama, nodes.client, 1, NUM_ROWS)
    out = nodes_folder / "nfs" / "retried"
    there = ["--set", "cluster.entry_point={resources: {special: 1}}"]
    hasty = ["--set", "run.row_timeout_s=0.000001", "--set", "run.max_error_rate=1"]
    code, said, told = nodes.cli("submit", job, *there, *hasty)
    assert code == 0 and f"submitted to {nodes.url}" in told, said + told
    (run,) = [job["run_id"] for job in json.loads(nodes.cli("list", "--json")[1])["runs"]]
    assert driver_node(nodes, run) == nodes.special
    errors = pq.read_table(out / "errors")
    assert errors["error_class"].to_pylist() == ["RowTimeoutError"] * NUM_ROWS

    code, said, told = nodes.cli("retry-errors", job, "--set", f"cluster.address={nodes.url}")
    assert code == 0, said + told
    assert nodes.cli("verify", out)[0] == 0
    assert sorted(pq.read_table(out / "data")["row_id"].to_pylist()) == list(range(NUM_ROWS))
    (retried,) = events(out, "retry_started")
    assert retried["rows"] == NUM_ROWS and not list((out / "errors").glob("*.parquet"))
    assert driver_node(nodes, f"{run}.2") != nodes.special, "which only the first one asked for"
