"""How far a job is, read from its output folder alone: it works after the cluster has gone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.learned import read_learned
from eevp_batch.storage.plan import Plan, read_plan
from eevp_batch.storage.store import Store

State = Literal["planned", "running", "interrupted", "failed", "done"]
RETRY_START = "retry_started"
"""Event with which a run begins that tries error rows again."""
RUN_STARTS = ("job_started", "job_resumed", RETRY_START)
"""Events with which any run of a job begins."""


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a job.

    Attributes:
        rows_total: planned input rows.
        totals: counters of the committed chunks.
        tokens_per_s: generated tokens per second of the last run that committed any, from its
            first replica's readiness to its last commit; None before that.
        last_progress_unix_s: when the last chunk was finished; None before the first.
        reason: why the last run stopped, where it said so and left work undone.
        learning: what became of a job's learning of exits; None where it does not learn.
        drift: what the audit warned of, see `audit_drift` in the event log; None without a warning.
    """

    run_id: str
    state: State
    rows_total: int
    chunks_total: int
    chunks_done: int
    totals: ChunkStats
    tokens_per_s: float | None
    last_progress_unix_s: float | None
    reason: str | None
    learning: str | None = None
    drift: dict[str, Any] | None = None

    @property
    def rows_done(self) -> int:
        """Rows in committed chunks."""
        return self.totals.rows

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return {
            **values,
            "rows_done": self.rows_done,
            "mean_exit_layer": self.totals.mean_exit_layer,
            "totals": self.totals.to_json(),
        }


@dataclass
class _LastRun:
    """What the event log says of the last run; the rate is that of the last run that has one."""

    is_known: bool = False
    ready_unix_s: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    last_event: str | None = None
    reason: str | None = None
    drift: dict[str, Any] | None = None

    def commit(self, unix_s: float, tokens: int) -> None:
        """Count a committed chunk in."""
        self.tokens += tokens
        if self.tokens and self.ready_unix_s is not None and unix_s > self.ready_unix_s:
            self.tokens_per_s = self.tokens / (unix_s - self.ready_unix_s)


def read_status(store: Store) -> Status:
    """Read plan, commit records, events and lock; nothing is written.

    A lock that a process on another machine may have left is watched for some seconds.

    Raises:
        UsageError: the folder holds no job.
        JobFailedError: its plan or a record is damaged.
    """
    plan = read_plan(store)
    run = _last_run(store)
    totals, chunks_done = ChunkStats(), 0
    begin, last = math.inf, None
    for chunk in Committer(store, plan).chunks():
        chunks_done += 1
        totals += chunk.stats
        begin = min(chunk.attempts[0].started_unix_s, begin)
        last = max(chunk.last.finished_unix_s, last or 0.0)
    rate = run.tokens_per_s
    if not run.is_known and last is not None and last > begin:
        rate = totals.generated_tokens / (last - begin)  # a job without an event log
    state = _state(store, run, chunks_done, len(plan.chunks))
    return Status(
        run_id=plan.run_id,
        state=state,
        rows_total=plan.num_rows,
        chunks_total=len(plan.chunks),
        chunks_done=chunks_done,
        totals=totals,
        tokens_per_s=rate,
        last_progress_unix_s=last,
        reason=None if state == "done" else run.reason,
        learning=_learning(store, plan),
        drift=run.drift,
    )


def _learning(store: Store, plan: Plan) -> str | None:
    if plan.fields["exit.mode"] != "learn":
        return None
    learned = read_learned(store)
    return "no exits have been learned so far" if learned is None else learned.text


def read_events(store: Store) -> Iterator[dict[str, Any]]:
    """The job's events, oldest first; a line that a crash cut short is left out."""
    for line in store.read_lines(layout.EVENTS):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and _is_sound(event):
            yield event


def _is_sound(event: dict[str, Any]) -> bool:
    """Whether what is read of an event has the types that were written."""
    return (
        isinstance(event.get("event"), str | None)
        and type(event.get("unix_s")) in (int, float, type(None))
        and type(event.get("generated_tokens", 0)) is int
    )


def _last_run(store: Store) -> _LastRun:
    run = _LastRun()
    for event in read_events(store):
        kind, unix_s = event.get("event"), event.get("unix_s")
        if kind in RUN_STARTS:
            run = _LastRun(is_known=True, tokens_per_s=run.tokens_per_s, drift=run.drift)
        elif kind == "replica_ready" and run.ready_unix_s is None:
            run.ready_unix_s = unix_s
        elif kind == "chunk_committed" and unix_s is not None:
            run.commit(unix_s, int(event.get("generated_tokens", 0)))
        elif kind == "audit_drift":
            run.drift = event
        run.last_event = kind
        run.reason = event.get("reason") if _is_last(kind) else None
    return run


def _is_last(event: str | None) -> bool:
    return event in ("job_finished", "job_interrupted", "job_failed")


def _state(store: Store, run: _LastRun, chunks_done: int, num_chunks: int) -> State:
    if store.is_locked(layout.LOCK):
        return "running"
    if chunks_done == num_chunks and store.exists(layout.SUCCESS):  # a record may be lost later
        return "done"
    if run.last_event == "job_failed":
        return "failed"
    return "interrupted" if run.last_event or chunks_done else "planned"
