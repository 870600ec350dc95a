"""What a job says of the cluster that it is sent to: how to reach it, what runs where, with what.

One cluster of three raylets. Its nodes' interpreter is that of a small virtual environment, which
sees the packages of this one: Ray copies it for a job that brings packages of its own.
"""

from __future__ import annotations

import json
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests

from tests.cluster.nodes import Nodes, events, wait_for, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_ROWS = 40


@pytest.fixture(scope="module")
def nodes(nodes_folder: Path) -> Iterator[Nodes]:
    home = nodes_folder / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    cluster = Nodes(nodes_folder, home / "bin" / "python")
    try:
        yield cluster
    finally:
        cluster.close()


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


def test_a_job_that_is_cancelled_while_it_waits_for_a_node_ends_when_it_gets_it(
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    there = ["--no-wait", "--set", "cluster.entry_point={resources: {special: 1}}"]
    runs = {}
    for name in ("holder", "waiter"):
        job = write_job(nodes_folder, name, tiny_llama, nodes.url, 1)
        code, run, said = nodes.cli("submit", job, *there)
        assert code == 0, said
        runs[name] = run.strip()

    def state(name: str) -> str:
        listed = json.loads(nodes.cli("list", "--json", "--address", nodes.url)[1])["runs"]
        return next(str(found["state"]) for found in listed if found["run_id"] == runs[name])

    assert state("waiter") == "pending"
    code, _, said = nodes.cli("cancel", runs["waiter"])
    assert code == 0 and "has not begun" in said, said
    assert state("waiter") == "pending", "Ray's word for it until a node takes it"
    assert nodes.cli("cancel", runs["holder"])[0] == 0
    wait_for(lambda: state("waiter") == "interrupted")
    assert not (nodes_folder / "nfs" / "waiter" / "data").exists(), "nothing of it was done"


def test_packages_that_a_job_brings_are_there_for_its_driver_and_its_replicas(
    nodes: Nodes, nodes_folder: Path, tiny_llama: Path
) -> None:
    """The package notes each interpreter that starts with it."""
    seen = nodes_folder / "seen"
    seen.mkdir()
    wheel = write_wheel(nodes_folder, seen)
    job = write_job(nodes_folder, "brought", tiny_llama, nodes.url, 1, NUM_ROWS)
    code, said, told = nodes.cli("submit", job, "--set", f"cluster.pip=[{wheel}]")
    assert code == 0, said + told
    out = nodes_folder / "nfs" / "brought"
    assert nodes.cli("verify", out)[0] == 0
    (ready,), (started,) = events(out, "replica_ready"), events(out, "job_started")
    assert {str(ready["pid"]), str(started["pid"])} <= {path.name for path in seen.iterdir()}


def write_wheel(folder: Path, seen: Path) -> Path:
    """A package whose `.pth` file leaves a file named after each process that starts with it."""
    about = "eevp_witness-1.0.dist-info"
    files = {
        "eevp_witness.pth": f"import os; open('{seen}/%d' % os.getpid(), 'w').close()\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: eevp-witness\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    path = folder / "eevp_witness-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path
