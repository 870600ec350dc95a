"""Whole jobs with a real model: their files, and the two ways to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eevp_batch.cluster.jobs import JobResult, run_job
from eevp_batch.prepare import prepare
from eevp_batch.spec_file import dump_spec
from eevp_batch.storage.plan import open_plan


def write_job(folder: Path, fields: Mapping[str, Any]) -> Path:
    """A job file; its output goes to `out` beside it."""
    path = folder / "job.yaml"
    whole = {"version": 1, "name": "real", **fields, "output": {"path": "out"}}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def run_in_process(path: Path, overrides: Sequence[str] = ()) -> JobResult:
    """Run a job as `submit` does: checks, plan, a local Ray, commits."""
    job = prepare(str(path), overrides)
    plan = open_plan(job.store, job.plan, dump_spec(job.spec))
    return run_job(
        job.spec, job.model, plan, job.store, on_message=lambda text: None, dashboard=False
    )


def command(*arguments: object) -> subprocess.Popen[str]:
    """`eevp-batch` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eevp_batch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EEVP_DASHBOARD": "0"},
    )


def finished(process: subprocess.Popen[str], timeout_s: float = 100.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, once it has ended."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()  # The guard ends the rest of the job.
        process.communicate()
        raise
    return process.returncode, stdout, stderr
