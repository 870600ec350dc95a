"""What the replicas of a run write to stdout and stderr, from the nodes that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eevp_batch.cluster.cluster_job import ClusterJob
from eevp_batch.cluster.job_server import JobServer
from eevp_batch.errors import ClusterError, UsageError
from eevp_batch.records import replica_number

_MOST_ACTORS = 10_000


@dataclass(frozen=True, slots=True)
class ReplicaActor:
    """One replica that Ray has started for a run.

    Attributes:
        number: of its place in the fleet.
        state: as Ray calls it, such as ALIVE.
    """

    actor_id: str
    name: str
    number: int
    state: str


def replicas_of(server: JobServer, job: ClusterJob, number: int) -> list[ReplicaActor]:
    """The replicas of one place of a run, in the order of their start.

    Args:
        server: knows the run.
        job: the run.
        number: of the place, from 0.

    Raises:
        UsageError: there was none.
        ClusterError: the server cannot be reached.
    """
    found: list[ReplicaActor] = []
    if job.ray_job_id is not None:
        answer = server.get(
            "/api/v0/actors",
            limit=_MOST_ACTORS,
            detail=1,
            filter_keys="job_id",
            filter_predicates="=",
            filter_values=job.ray_job_id,
        )
        rows: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        rows.sort(key=lambda row: int(row.get("start_time") or 0))
        found = [actor for row in rows if (actor := _replica(row)) is not None]
    chosen = [actor for actor in found if actor.number == number]
    if not chosen:
        numbers = ", ".join(map(str, sorted({actor.number for actor in found}))) or "none so far"
        raise UsageError(f"--replica: found {number}; allowed: those of {job.run_id}: {numbers}")
    return chosen


def written_by(server: JobServer, actor: ReplicaActor) -> Iterator[str]:
    """What a replica wrote, stderr first; nothing where its node has gone with it.

    Args:
        server: knows it.
        actor: the replica.
    """
    for suffix in ("err", "out"):
        try:
            answer = server.get(
                "/api/v0/logs/file", actor_id=actor.actor_id, suffix=suffix, lines=-1
            )
        except ClusterError:
            continue
        yield answer.content.decode("utf-8", "replace")


def _replica(row: dict[str, Any]) -> ReplicaActor | None:
    number = replica_number(str(row.get("name")))
    if number is None:
        return None
    return ReplicaActor(str(row["actor_id"]), str(row["name"]), number, str(row["state"]))
