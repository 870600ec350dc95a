"""How long a job will take with so many replicas, from the event log of a run that has ended.

A replica is ready after a start; then it makes tokens at one rate while there are chunks to lease;
at the end its engine runs empty, which takes longer than the tokens that are left would. Replicas
work side by side, one coordinator commits for all of them, and one pass verifies the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eevp_batch.errors import UsageError
from eevp_batch.spec import JobSpec
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.status import RETRY_START, RUN_STARTS, read_events
from eevp_batch.storage.store import Store


@dataclass(frozen=True, slots=True)
class Pace:
    """What one replica does.

    Attributes:
        start_s: from the job's start until it is ready.
        tokens_per_s: generated while its engine is full.
        tokens_per_row: generated for an input row, all samples together.
        drain_s: what first and last rows take longer than their tokens at that rate.
        commit_s: seconds of the coordinator for a chunk; 0 where they are not known.
        verify_s: seconds after the last commit, for a chunk.
    """

    start_s: float
    tokens_per_s: float
    tokens_per_row: float
    drain_s: float
    commit_s: float
    verify_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a whole job, by what they are spent on.

    Attributes:
        limit: who is busy all the time: the replicas, or the coordinator with their commits.
    """

    replicas: int
    start_s: float
    work_s: float
    drain_s: float
    verify_s: float
    limit: Literal["replicas", "coordinator"]

    @property
    def total_s(self) -> float:
        """From the job's start to `_SUCCESS`."""
        return self.start_s + self.work_s + self.drain_s + self.verify_s

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "total_s": self.total_s}


def predict(pace: Pace, rows: int, chunks: int, replicas: int) -> Prediction:
    """Work out how long a job takes.

    Args:
        pace: of a replica with the same model and settings, on such a machine.
        rows: of the job.
        chunks: of the job.
        replicas: that work side by side.
    """
    # Chunks are whole: the busiest replica has a part of one more than its share.
    busiest = math.ceil(chunks / replicas) / chunks
    work_s = rows * pace.tokens_per_row * busiest / pace.tokens_per_s
    commits_s = chunks * pace.commit_s
    return Prediction(
        replicas=replicas,
        start_s=pace.start_s,
        work_s=max(work_s, commits_s),
        drain_s=pace.drain_s,
        verify_s=chunks * pace.verify_s,
        limit="replicas" if work_s >= commits_s else "coordinator",
    )


def predict_like(out: str, spec: JobSpec, plan: Plan) -> list[Prediction]:
    """How long a job takes at the pace of one that is done: with 1, 2, 4, .. replicas and its own.

    Args:
        out: output folder of a finished job with the same model and settings.
        spec: the job.
        plan: its chunks.

    Raises:
        UsageError: `out` holds no finished job.
    """
    store = Store.open(out)
    try:
        pace = measure_pace(read_events(store))
    except UsageError as error:
        raise UsageError(f"{store.text}: {error}") from error
    own = spec.cluster.max_replicas
    counts = sorted({own, *(1 << power for power in range((4 * own).bit_length()))})
    return [predict(pace, plan.num_rows, len(plan.chunks), count) for count in counts]


def measure_pace(events: Iterable[Mapping[str, Any]], commit_s: float = 0.0) -> Pace:
    """The pace of a finished job's last run; a retry's few rows are no measure.

    Args:
        events: its event log, oldest first.
        commit_s: seconds of the coordinator for a chunk, where they are known.

    Raises:
        UsageError: the log does not tell of a run that worked and has ended.
    """
    run: list[Mapping[str, Any]] = []
    is_retry = False
    for event in events:
        if event.get("event") in RUN_STARTS:
            is_retry = event["event"] == RETRY_START
            run = run if is_retry else []
        if not is_retry:
            run.append(event)
    times = {kind: _times(run, kind) for kind in ("replica_ready", "chunk_leased")}
    commits = [event for event in run if event.get("event") == "chunk_committed"]
    end = _times(run, "job_finished")
    if not (end and commits and times["replica_ready"] and run[0].get("event") in RUN_STARTS):
        raise UsageError("events: found no run that committed a chunk and has ended")
    replicas = len({str(event["replica"]) for event in commits})
    ready, last = min(times["replica_ready"]), float(commits[-1]["unix_s"])
    tokens = sum(int(event["generated_tokens"]) for event in commits)
    rows = sum(int(event["rows_ok"]) + int(event["rows_error"]) for event in commits)
    rate = _full_rate(commits, max(times["chunk_leased"])) or tokens / max(last - ready, 1e-9)
    return Pace(
        start_s=ready - float(run[0]["unix_s"]),
        tokens_per_s=rate / replicas,
        tokens_per_row=tokens / rows,
        drain_s=max(0.0, last - ready - tokens / rate),
        commit_s=commit_s,
        verify_s=max(0.0, end[-1] - last) / len(commits),
    )


def _times(run: Iterable[Mapping[str, Any]], kind: str) -> list[float]:
    return [float(event["unix_s"]) for event in run if event.get("event") == kind]


def _full_rate(commits: list[Mapping[str, Any]], last_lease: float) -> float | None:
    """Tokens per second of all replicas while there was something to lease; None: not for long."""
    full = [event for event in commits if float(event["unix_s"]) <= last_lease]
    if len(full) < 3:
        return None
    seconds = float(full[-1]["unix_s"]) - float(full[0]["unix_s"])
    tokens = sum(int(event["generated_tokens"]) for event in full[1:])
    return tokens / seconds if seconds > 0 else None
