"""A job on its way to a cluster: what is uploaded, what the cluster runs, what it is told.

The runtime environment brings this package as it is here, the job file, and the small files that
`sending` found; Ray, torch and the package's other dependencies are the cluster's own, or
`cluster.pip`'s.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import eevp_batch
from eevp_batch.cluster.cluster_job import PROGRESS, ClusterJob
from eevp_batch.cluster.job_server import EntryPoint, JobServer
from eevp_batch.cluster.ray_names import job_metadata
from eevp_batch.cluster.ray_safety import FORCE
from eevp_batch.cluster.sending import SENT_INPUTS, Parcel
from eevp_batch.errors import JobFailedError, JobInterruptedError, SpecError
from eevp_batch.spec_file import SpecSource

STOP_WAIT_S = 30
"""How long Ray waits between SIGTERM and SIGKILL when a job is stopped."""
_STOP_WITHIN_S = 25  # by itself, so that what it leaves is in order

_PROGRAM = ("python", "-m", "eevp_batch")


@contextlib.contextmanager
def entry_point(
    source: SpecSource,
    parcel: Parcel,
    run_id: str,
    out: str,
    command: Sequence[str],
    overrides: Sequence[str],
) -> Iterator[EntryPoint]:
    """What to run on the cluster; its files are there for the block.

    Args:
        source: the job.
        parcel: what goes along.
        run_id: of the run.
        out: output folder or URI.
        command: of this package, with its options; `run`, say.
        overrides: that the user gave.

    Raises:
        SpecError: an environment variable that the job names is not set.
    """
    cluster = source.spec.cluster
    words = [*_PROGRAM, *command, parcel.job_file.name]
    words += ["--run-id", run_id, "--stop-within", str(_STOP_WITHIN_S)]
    words += ["--sent", SENT_INPUTS] if parcel.has_inputs else []
    for override in (*overrides, *parcel.overrides):  # of two, the later one counts
        words += ["--set", override]
    with tempfile.TemporaryDirectory(prefix="eevp-") as folder:
        parcel.write(Path(folder))
        environment: dict[str, Any] = {
            "working_dir": folder,
            "py_modules": [str(Path(eevp_batch.__file__).parent)],
            "excludes": ["**/__pycache__/"],
            "env_vars": _variables(source),
        }
        if cluster.pip:
            environment["pip"] = list(cluster.pip)
        yield EntryPoint(
            command=shlex.join(words),
            runtime_env=environment,
            metadata={
                **job_metadata(run_id, out),
                PROGRESS: "submitted",
                "eevp_batch": eevp_batch.__version__,
            },
            cpus=cluster.entry_point.cpus,
            memory_bytes=cluster.entry_point.memory or 0,
            resources=dict(cluster.entry_point.resources),
        )


def result_of(server: JobServer, submission_id: str) -> int:
    """The exit code of a job that has ended.

    Raises:
        JobInterruptedError: it was cancelled.
        JobFailedError: its entry point was killed, or never began.
    """
    job = server.job(submission_id)
    if job.state == "interrupted":
        raise JobInterruptedError(f"{job.run_id} was cancelled; the same command goes on with it")
    if job.state == "done":
        return 0
    if job.exit_code is None or job.exit_code < 0:
        raise JobFailedError(f"{job.run_id}: {_reason(job)}")
    return job.exit_code


def _reason(job: ClusterJob) -> str:
    lines = [line for line in job.message.splitlines() if line.strip()]
    return lines[0] if lines else f"Ray says that it has {job.state}"


def _variables(source: SpecSource) -> dict[str, str]:
    """Environment variables of the job's processes."""
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    if os.environ.get(FORCE):
        found[FORCE] = os.environ[FORCE]
    for number, name in enumerate(source.spec.cluster.env):
        if name not in os.environ:
            field = f"cluster.env[{number}]"
            origin = source.origin(field)
            allowed = "the name of an environment variable that is set"
            raise SpecError(origin.file, origin.line, field, name, allowed)
        found[name] = os.environ[name]
    return found
