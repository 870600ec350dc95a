"""A cluster of three raylets for tests, the jobs that are sent to it, and what they leave."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 400
MODEL_LINE = 3  # in the job file
KEPT = ("RAY_worker_niceness",)
"""Of Ray's variables: how a machine is shared by those who test on it."""


class Nodes:
    """The cluster, in a process of its own; its environment lets this test's commands in.

    Args:
        folder: for what commands remember of their runs.
        python: the nodes' interpreter; None: this one.

    Attributes:
        url: of the job server.
        client: address of the head's Ray Client server.
        special: id of the node that has the resource `special`.
    """

    def __init__(self, folder: Path, python: Path | None = None) -> None:
        python = python or Path(sys.executable)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k in KEPT or not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_STATE_HOME": str(folder / "state"),
            # The entry point is what `python` means on a node; the package comes with the job.
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            [str(python), "-m", "tests.cluster.three_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        said = json.loads(self._line())
        self.url, self.client, self.special = said["url"], said["client"], said["special"]

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
            [sys.executable, "-m", "eevp_batch", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
            timeout=400,
        )
        return found.returncode, found.stdout, found.stderr

    def _line(self) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith(("{", "removed")))


def write_job(
    folder: Path, name: str, model: Path, url: str, replicas: int, num_rows: int = NUM_ROWS
) -> Path:
    """A job whose prompts lie where no node looks, and whose output they all see."""
    home = folder / name
    home.mkdir()
    rows = range(num_rows)
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
