"""What the Ray dashboard calls a job, its replicas and what these do.

Names are for people: two jobs on one cluster are told apart by the Ray namespaces that their actors
live in, and the names of calls are few, since Ray counts tasks by name.
"""

from __future__ import annotations

from eevp_batch.cluster.cluster_job import NAME, OURS, OUTPUT, RUN_ID

CALLS = {
    "ready": "load the model",
    "process": "generate a chunk",
    "progress": "report progress",
    "learn": "learn exits",
}
"""Name of a call of a replica's, by its method."""


def job_name(run_id: str) -> str:
    """Name of a job, such as `eevp:corpus-demo`.

    Args:
        run_id: `corpus-demo-` and a random number.
    """
    return OURS + (run_id.rpartition("-")[0] or run_id)


def actor_name(namespace: str, replica: str) -> str:
    """Name of a replica's actor, such as `eevp:corpus-demo/replica-0`.

    Args:
        namespace: of the run's actors: its run id, a dot and a random number.
        replica: its name among the job's, such as `eevp-replica-0`.
    """
    run_id = namespace.rpartition(".")[0] or namespace
    return f"{job_name(run_id)}/{replica.removeprefix('eevp-')}"


def job_metadata(run_id: str, output: str) -> dict[str, str]:
    """What Ray is told of a job; the dashboard shows `job_name` as the job's name."""
    return {NAME: job_name(run_id), RUN_ID: run_id, OUTPUT: output}
