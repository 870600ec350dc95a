"""The short form of `python -m tests.nightly.chaos`: a replica, a raylet, the driver twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_survives_deaths_of_every_kind(tmp_path: Path) -> None:
    """In a process of its own, for the cluster's nodes live in it."""
    command = [sys.executable, "-m", "tests.nightly.chaos", "--minutes", "0", "--rows", "160"]
    command += ["--out", str(tmp_path / "chaos.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["killed"] == {"replicas": 1, "raylets": 1, "drivers": 2}
