"""A run of ours as a cluster's job server knows it: its state in our words, and its metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.job_submission import JobDetails, JobStatus

RUN_ID, OUTPUT, PROGRESS, NAME = "eevp_run_id", "eevp_output", "eevp_progress", "job_name"
"""Keys of a job's metadata; the last one is Ray's own."""
OURS = "eevp:"
"""What the name of a job begins with where jobs of others stand beside it."""

_INTERRUPTED = 130
_STATES = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "interrupted",
    JobStatus.SUCCEEDED: "done",
    JobStatus.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """One of our runs as the job server knows it.

    Attributes:
        ray_job_id: Ray's own id of it, once its entry point has joined the cluster.
        state: pending, running, interrupted, failed or done, as `status` has it.
        message: what Ray says of it.
        exit_code: of its entry point; None before its end, and where it was stopped.
        started_unix_s: when it was submitted.
    """

    run_id: str
    submission_id: str
    ray_job_id: str | None
    state: str
    message: str
    exit_code: int | None
    started_unix_s: float | None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def has_started(self) -> bool:
        return self.state != "pending"

    @property
    def has_ended(self) -> bool:
        return self.state in ("interrupted", "failed", "done")

    @property
    def name(self) -> str:
        """The job's own name, such as `corpus-demo`."""
        return self.metadata.get(NAME, "").removeprefix(OURS)

    @property
    def output(self) -> str:
        return self.metadata.get(OUTPUT, "")

    @property
    def progress(self) -> str:
        return self.metadata.get(PROGRESS, "")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run_id": self.run_id,
            "submission_id": self.submission_id,
            "name": self.name,
            "state": self.state,
            "progress": self.progress or None,
            "output": self.output or None,
            "started_unix_s": self.started_unix_s,
        }


def ours(details: JobDetails) -> ClusterJob | None:
    """A job that `submit` made; None for any other.

    Args:
        details: what the job server says of it.
    """
    metadata = details.metadata or {}
    if RUN_ID not in metadata or details.submission_id is None:
        return None
    state = _STATES[JobStatus(details.status)]
    return ClusterJob(
        run_id=metadata[RUN_ID],
        submission_id=details.submission_id,
        ray_job_id=details.job_id,
        # Drained: Ray takes every exit code but 0 for a failure.
        state="interrupted" if details.driver_exit_code == _INTERRUPTED else state,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started_unix_s=details.start_time / 1000 if details.start_time else None,
        metadata=dict(metadata),
    )
