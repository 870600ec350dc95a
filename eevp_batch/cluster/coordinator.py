"""The coordinator: hands out leases, commits what comes back, replaces what dies, and stops.

There is one per job. It is the only committer and the only owner of retries. No row passes through
it, and what it holds does not grow with the rows that are done.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from typing import Any

from eevp_batch.cluster import news, rules, stall
from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.deaths import DeathWatch
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet, Outcome, Slot
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.news import News
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.progress import Meter, Progress, Recoveries, Stopwatch
from eevp_batch.errors import JobFailedError, StaleAttemptError, TooManyErrorsError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.plan import Plan

LOOK_EVERY_S = 1.0
_TICK_S = 0.25


class Coordinator:
    """Drives a fleet until everything in the backlog is committed.

    Args:
        spec: the job.
        plan: its chunks.
        fleet: its replicas, none of them started.
        committer: commits to the job's output.
        events: the job's diary.
        backlog: what is to be done.
        num_done: chunks that earlier runs committed, of those that this run is about.
        totals: of all chunks that earlier runs committed.
        on_progress: called about once a second, and once at the end.
        on_message: told in one sentence what a person wants to know as it happens.
        phases: tells which chunks have exits.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        fleet: Fleet,
        committer: Committer,
        events: EventLog,
        backlog: Backlog,
        num_done: int,
        totals: ChunkStats,
        on_progress: Callable[[Progress], None],
        on_message: Callable[[str], None],
        phases: Phases,
    ) -> None:
        self._spec, self._plan, self._fleet = spec, plan, fleet
        self._committer, self._events = committer, events
        self._on_progress, self._on_message = on_progress, on_message
        self._phases = phases
        self._backlog, self._leases = backlog, backlog.leases
        self.totals = totals
        self.recoveries = Recoveries()
        self.num_done_before = num_done
        self._meter = Meter(
            totals,
            time.monotonic(),
            backlog.retried_rows or plan.num_rows,
            0 if backlog.is_retry else totals.rows,
        )
        self._deaths = DeathWatch(fleet.slots, spec.run)
        self._stall = stall.StallWatch(
            spec.run.no_progress_timeout_s,
            lambda: stall.describe(fleet.slots, self._leases.leases_of, fleet.resources),
        )
        self._look_due_s = 0.0
        self._waiting, self._in_storage = Stopwatch(), Stopwatch()
        self._is_draining = self._has_told_draining = self._has_too_many_errors = False

    @property
    def num_committed(self) -> int:
        """Committed chunks, those of earlier runs included."""
        return self.num_done_before + self._leases.num_committed

    @property
    def working_s(self) -> float:
        """Seconds since the first replica was ready."""
        return self._meter.working_s(time.monotonic())

    @property
    def is_finished(self) -> bool:
        """Whether everything in the backlog is committed."""
        return not self._leases.num_unfinished

    def drain(self) -> None:
        """Lease nothing more; `run` returns once what is under way is committed.

        Safe to call from a signal handler.
        """
        self._is_draining = True

    def run(self) -> None:
        """Work until every chunk is committed, or until what was under way at `drain` is.

        Raises:
            JobFailedError: a replica's code failed, or replicas kept dying.
            TooManyErrorsError: more rows failed than the job allows; what was under way is
                committed.
        """
        for found in self._phases.start():
            self._tell(found)
        while not self.is_finished and not (self._is_draining and not self._leases.num_leased):
            self._start_replicas()
            self._hand_out()
            self._ask_to_learn()
            with self._waiting:
                outcomes = list(self._fleet.wait(_TICK_S))
            for outcome in outcomes:
                self._take(outcome)
            self._look()
        if self.is_finished:
            self._meter.settle(self.totals)
        self._on_progress(self.progress())
        if self._has_too_many_errors:
            rules.check_errors(self.totals, self._spec.run, self._plan.num_rows)

    def progress(self) -> Progress:
        """The job now."""
        return self._meter.progress(
            time.monotonic(),
            open_rows=sum(slot.open_rows for slot in self._fleet.slots),
            waited_s=self._waiting.total_s,
            storage_s=self._in_storage.total_s,
            rows_error=self.totals.rows_error,
            replicas=len(self._fleet.slots),
            replicas_ready=sum(slot.ready is not None for slot in self._fleet.slots),
            chunks_total=self.num_done_before + self._backlog.num_chunks,
            chunks_committed=self.num_committed,
            chunks_leased=self._leases.num_leased,
            chunks_pending=self._leases.num_pending,
            is_draining=self._is_draining,
        )

    # --- handing out -----------------------------------------------------------------------------

    def _start_replicas(self) -> None:
        if self._is_draining:
            return
        now_s = time.monotonic()
        for slot in self._fleet.slots:
            if slot.handle is None and slot.not_before_s <= now_s:
                self._fleet.start(slot)

    def _hand_out(self) -> None:
        """Lease pending chunks to the replicas that hold the fewest; the last ones to all alike."""
        if self._is_draining:
            return
        share = math.ceil(self._leases.num_unfinished / len(self._fleet.slots))
        with_room = [
            (held, slot.index, slot)
            for slot in self._fleet.slots
            if slot.ready is not None
            and not slot.is_learning
            and (held := self._leases.num_held(slot.name)) < min(slot.max_leases, share)
        ]
        heapq.heapify(with_room)
        while with_room and self._leases.num_pending:
            held, index, slot = heapq.heappop(with_room)
            # Where it gets nothing, others may: one that holds less may be kept for a suspect.
            if self._lease(slot) and held + 1 < min(slot.max_leases, share):
                heapq.heappush(with_room, (held + 1, index, slot))

    def _lease(self, slot: Slot) -> bool:
        found = self._backlog.lease(slot.name, self._phases.phase)
        if found is None:
            return False
        lease, task = found
        self._write_event("chunk_leased", **news.lease_fields(lease, task.span))
        self._fleet.process(slot, lease, task)
        return True

    def _ask_to_learn(self) -> None:
        """Once there are rows to learn from, the replica that holds the fewest chunks does it."""
        if self._is_draining or self._backlog.is_retry or not self._phases.is_learning_due:
            return
        slots = [slot for slot in self._fleet.slots if slot.ready is not None]
        if not slots:
            return
        slot = min(slots, key=lambda slot: self._leases.num_held(slot.name))
        order = self._phases.learn(self._plan.num_rows - self.totals.rows)
        self._tell(news.learning_started(slot.name, order))
        self._fleet.learn(slot, order)

    # --- taking in -------------------------------------------------------------------------------

    def _take(self, outcome: Outcome) -> None:
        if outcome.slot.handle is None and (outcome.lease is None or outcome.value is None):
            return  # it came with the one for which its replica was given up just now
        if outcome.lost is not None:
            self._bury(outcome.slot, outcome.lost)
        elif outcome.failed is not None:
            self._take_failure(outcome)
        elif outcome.call == "ready":
            self._take_ready(outcome.slot, outcome.value)
        elif outcome.call == "progress":
            self._take_progress(outcome.slot, outcome.value)
        elif outcome.lease is not None:
            self._commit(outcome.slot, outcome.lease, outcome.value)
        elif outcome.call == "learn":
            outcome.slot.is_learning = False
            self._tell(self._phases.has_learned(outcome.value))

    def _take_progress(self, slot: Slot, heard: LoopProgress) -> None:
        shortage = news.memory_shortage(slot.name, slot.progress, heard)
        if shortage is not None:
            self.recoveries += Recoveries(memory_shortages=shortage.fields["steps"])
            self._tell(shortage)
        slot.progress = heard
        if heard.max_resident:  # another engine, or one short of memory, may hold more or fewer
            slot.max_leases = rules.max_leases(heard.max_resident, self._plan)
        self._meter.update(slot.index, slot.name, heard)

    def _take_failure(self, outcome: Outcome) -> None:
        """End the job for what the code raised, except where a fresh start may help."""
        if outcome.call != "ready" or outcome.is_ours:
            raise JobFailedError(outcome.failed)
        self._bury(outcome.slot, str(outcome.failed))

    def _take_ready(self, slot: Slot, ready: Any) -> None:
        slot.ready = ready
        slot.max_leases = rules.max_leases(ready.max_resident, self._plan)
        self._meter.replica_is_ready(time.monotonic())
        self._write_event("replica_ready", **news.ready_fields(slot, ready))

    def _commit(self, slot: Slot, lease: Lease, attempt: Attempt) -> None:
        # Epochs start at 1: no attempt is of lease 0.
        current_epoch = self._leases.current_epoch(lease.chunk_id) or 0
        try:
            if self._backlog.take_piece(lease, attempt):
                self._settle(slot, attempt.stats.rows)
                return
            with self._in_storage:
                stats = self._committer.commit(attempt, current_epoch).attempt.stats
        except StaleAttemptError as error:
            self.recoveries += Recoveries(attempts_discarded=1)
            self._write_event("attempt_discarded", **_names(lease), reason=str(error))
            return
        pieces = self._backlog.commit(lease)
        with self._in_storage:
            for piece in pieces:
                self._committer.discard(piece)
        superseded = self._backlog.superseded(lease.chunk_id)
        self.totals = self.totals.without_errors(superseded) + stats
        rows = self._backlog.num_rows(lease.chunk_id)
        self._settle(slot, rows - sum(piece.stats.rows for piece in pieces))
        self._write_event(
            "chunk_committed",
            **_names(lease),
            rows_ok=stats.rows_ok,
            rows_error=stats.rows_error,
            generated_tokens=stats.generated_tokens,
        )
        for found in self._phases.committed(attempt, self.totals.audit):
            self._tell(found)
        self._check_errors()

    def _settle(self, slot: Slot, rows: int) -> None:
        """A replica has finished something that stays."""
        slot.committed_rows += rows
        self._meter.rows_settled += rows
        self._deaths.finished()

    def _check_errors(self) -> None:
        """Drain once more rows failed than the job allows; a retry is judged at its end."""
        if self._backlog.is_retry or self._has_too_many_errors:
            return
        try:
            rules.check_errors(self.totals, self._spec.run, self._plan.num_rows)
        except TooManyErrorsError as error:
            self._has_too_many_errors = True
            self._on_message(str(error))
            self.drain()

    # --- deaths ----------------------------------------------------------------------------------

    def _bury(self, slot: Slot, reason: str) -> None:
        """Give a replica up: its chunks are pending again, its slot is free for the next one."""
        name, was_learning = slot.name, slot.is_learning
        returned, set_aside = self._backlog.release(name, reason)
        self._fleet.bury(slot)
        self.recoveries += Recoveries(
            replica_deaths=1, chunks_returned=len(returned), rows_set_aside=len(set_aside)
        )
        self._write_event(
            "replica_dead",
            replica=name,
            reason=reason,
            chunks=[lease.chunk_id for lease in returned],
        )
        self._on_message(f"{name} died; {len(returned)} chunks go back: {reason}")
        tried_suspect = any(lease.is_alone for lease in returned)
        self._deaths.died(slot, reason, tried_suspect=tried_suspect)
        for found in (*set_aside, *(self._phases.learner_died() if was_learning else ())):
            self._tell(found)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Report, and ask the replicas for the next report."""
        if self._is_draining and not self._has_told_draining:
            self._tell_draining()
        if time.monotonic() < self._look_due_s:
            return
        self._look_due_s = time.monotonic() + LOOK_EVERY_S
        with self._in_storage:
            self._committer.check_lock()
            self._events.flush()
        self._fleet.poll()
        found = self.progress()
        self._on_progress(found)
        self._stall.look(found)

    def _tell_draining(self) -> None:
        self._has_told_draining = True
        self._write_event("job_draining", chunks_in_flight=self._leases.num_leased)
        self._on_message(
            f"stopping: {self._leases.num_leased} chunks under way are finished first; interrupt "
            "again to stop at once, which loses those chunks and nothing else"
        )

    def _tell(self, told: News) -> None:
        self._write_event(told.event, **told.fields)
        self._on_message(told.text)

    def _write_event(self, event: str, **fields: Any) -> None:
        with self._in_storage:
            self._events.write(event, **fields)


def _names(lease: Lease) -> dict[str, Any]:
    return {"chunk_id": lease.chunk_id, "epoch": lease.epoch, "replica": lease.replica}
