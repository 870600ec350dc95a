"""The coordinator: hands out leases, commits what comes back, replaces what dies, and stops.

There is one per job. It is the only committer and the only owner of retries. No row passes through
it, and what it holds does not grow with the rows that are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from eevp_batch.cluster import news, rules, stall
from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.deaths import DeathWatch
from eevp_batch.cluster.diary import Diary
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet, Outcome, Slot
from eevp_batch.cluster.handout import Handout
from eevp_batch.cluster.headcount import Headcount
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.placement_watch import PlacementWatch
from eevp_batch.cluster.progress import Meter, Progress, Recoveries, Stopwatch
from eevp_batch.cluster.replica import GivenUp
from eevp_batch.cluster.staffing import Staffing
from eevp_batch.errors import JobFailedError, StaleAttemptError, TooManyErrorsError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.plan import Plan

LOOK_EVERY_S = 1.0
_TICK_S = 0.25
_MOST_REFILLS = 16
"""Turns in a row in which only those get work that have just finished something."""


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
        self._committer, self._on_progress = committer, on_progress
        self._phases, self._diary = phases, Diary(events, on_message)
        self._backlog, self._leases = backlog, backlog.leases
        self._handout = Handout(fleet, backlog, phases, self._diary)
        self._headcount = Headcount(fleet.slots, backlog.leases)
        self.totals = totals
        self.recoveries = Recoveries()
        self.num_done_before = num_done
        self._meter = Meter(
            totals,
            time.monotonic(),
            backlog.retried_rows or plan.num_rows,
            0 if backlog.is_retry else totals.rows,
            spec.sampling.n,
        )
        self._deaths = DeathWatch(fleet.slots, spec.run)
        self._staffing = Staffing(
            fleet, self._headcount, backlog, phases, self._deaths, self._diary
        )
        self._stall = stall.StallWatch(
            spec.run.no_progress_timeout_s,
            lambda: stall.describe(fleet.slots, self._leases.leases_of, fleet.resources),
        )
        self._placement = PlacementWatch(
            min(spec.cluster.min_replicas, len(fleet.slots)),
            spec.cluster.placement_timeout_s,
            fleet.resources,
            lambda: fleet.room(),
            on_message,
        )
        self._look_due_s, self._num_refills = 0.0, 0
        self._waiting, self._in_storage = Stopwatch(), self._diary.in_storage
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
            self._diary.tell(found)
        outcomes: list[Outcome] = []
        while not self.is_finished and not (self._is_draining and not self._leases.num_leased):
            self._hand_out(outcomes)
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

    def _hand_out(self, outcomes: Sequence[Outcome]) -> None:
        """Give work to whoever has room for more.

        Mostly that is who has just finished something. All replicas are looked at, which takes
        longer the more there are, when nothing or anything else has happened, and now and then.

        Args:
            outcomes: what has just been taken in.
        """
        is_ordinary = bool(outcomes) and all(outcome.is_ordinary for outcome in outcomes)
        is_refill = is_ordinary and self._num_refills < _MOST_REFILLS
        self._num_refills = self._num_refills + 1 if is_refill else 0
        if not is_refill:
            self.recoveries += self._staffing.release_leavers()
        if self._is_draining:
            return
        if is_refill:
            self._handout.refill(outcome.slot for outcome in outcomes if outcome.lease)
        else:
            self._staffing.start(time.monotonic())
            self._handout.pending()
        self._handout.learning(self._plan.num_rows - self.totals.rows)

    def progress(self) -> Progress:
        """The job now."""
        return self._meter.progress(
            time.monotonic(),
            # The rows of a copy are those of the chunk that it is a copy of.
            open_rows=sum(s.open_rows for s in self._fleet.slots if not self._has_copy(s)),
            waited_s=self._waiting.total_s,
            storage_s=self._in_storage.total_s,
            rows_error=self.totals.rows_error,
            replicas=self._headcount.num_present,
            replicas_ready=sum(slot.ready is not None for slot in self._fleet.slots),
            chunks_total=self.num_done_before + self._backlog.num_chunks,
            chunks_committed=self.num_committed,
            chunks_leased=self._leases.num_leased,
            chunks_pending=self._leases.num_pending,
            is_draining=self._is_draining,
        )

    def _has_copy(self, slot: Slot) -> bool:
        return any(lease.is_copy for lease in self._leases.leases_of(slot.name))

    # --- taking in -------------------------------------------------------------------------------

    def _take(self, outcome: Outcome) -> None:
        if outcome.slot.is_empty and (outcome.lease is None or outcome.value is None):
            return  # it came with the one for which its replica was given up just now
        if outcome.lost is not None and (outcome.is_told or outcome.slot.is_leaving):
            self.recoveries += self._staffing.let_go(outcome.slot, outcome.lost)
        elif outcome.lost is not None:
            self.recoveries += self._staffing.bury(outcome.slot, outcome.lost)
        elif outcome.failed is not None:
            self._take_failure(outcome)
        elif outcome.call == "place":
            self._diary.write("replica_placed", replica=outcome.slot.name)
        elif outcome.call == "ready":
            self._take_ready(outcome.slot, outcome.value)
        elif outcome.call == "progress":
            self._take_progress(outcome.slot, outcome.value)
        elif outcome.lease is not None and isinstance(outcome.value, GivenUp):
            self._take_back(outcome.slot, outcome.lease, outcome.value)
        elif outcome.lease is not None:
            self._commit(outcome.slot, outcome.lease, outcome.value)
        elif outcome.call == "learn":
            outcome.slot.is_learning = False
            self._diary.tell(self._phases.has_learned(outcome.value))

    def _take_back(self, slot: Slot, lease: Lease, given_up: GivenUp) -> None:
        """A replica made no attempt at a chunk: it was called off, or the replica leaves."""
        slot.is_leaving |= given_up.is_leaving
        if self._leases.give_back(lease):
            self.recoveries += Recoveries(chunks_returned=1)
        self._diary.of_lease("chunk_given_up", lease, is_leaving=given_up.is_leaving)

    def _take_progress(self, slot: Slot, heard: LoopProgress) -> None:
        shortage = news.memory_shortage(slot.name, slot.progress, heard)
        if shortage is not None:
            self.recoveries += Recoveries(memory_shortages=shortage.fields["steps"])
            self._diary.tell(shortage)
        slot.progress = heard
        slot.is_leaving |= heard.is_leaving
        is_busy = self._leases.num_held(slot.name) > 0
        slot.pace.heard(heard.finished_rows, is_busy, time.monotonic())
        if heard.max_resident:  # another engine, or one short of memory, may hold more or fewer
            slot.max_leases = rules.max_leases(heard.max_resident, self._plan)
        self._meter.update(slot.index, slot.name, heard)

    def _take_failure(self, outcome: Outcome) -> None:
        """End the job for what the code raised, except where a fresh start may help."""
        if outcome.call == "ready" and not outcome.is_ours:
            self.recoveries += self._staffing.bury(outcome.slot, str(outcome.failed))
        elif outcome.lease is not None and not self._leases.is_current(outcome.lease):
            # Another replica was first; if this one is broken, its next lease will tell.
            self._diary.of_lease("attempt_discarded", outcome.lease, reason=outcome.failed)
        else:
            raise JobFailedError(outcome.failed)

    def _take_ready(self, slot: Slot, ready: Any) -> None:
        slot.ready = ready
        slot.max_leases = rules.max_leases(ready.max_resident, self._plan)
        slot.pace.heard(0, is_busy=False, now_s=time.monotonic())
        self._meter.replica_is_ready(time.monotonic())
        self._diary.write("replica_ready", **news.ready_fields(slot, ready))

    def _commit(self, slot: Slot, lease: Lease, attempt: Attempt) -> None:
        # Epochs start at 1: no attempt is of lease 0.
        is_current, rivals = self._leases.is_current(lease), self._leases.rivals(lease)
        epoch = lease.epoch if is_current else self._leases.current_epoch(lease.chunk_id) or 0
        try:
            if self._backlog.take_piece(lease, attempt):
                self._settle(slot, attempt.stats.rows)
                return
            with self._in_storage:
                stats = self._committer.commit(attempt, epoch).attempt.stats
        except StaleAttemptError as error:
            slot.committed_rows += attempt.stats.rows  # by another one
            self.recoveries += Recoveries(attempts_discarded=1)
            self._diary.of_lease("attempt_discarded", lease, reason=str(error))
            return
        pieces = self._backlog.commit(lease)
        self._call_off(rivals)
        with self._in_storage:
            for piece in pieces:
                self._committer.discard(piece)
        superseded = self._backlog.superseded(lease.chunk_id)
        self.totals = self.totals.without_errors(superseded) + stats
        rows = self._backlog.num_rows(lease.chunk_id)
        self._settle(slot, rows - sum(piece.stats.rows for piece in pieces))
        self.recoveries += Recoveries(copies_first=int(lease.is_copy))
        self._diary.of_lease(
            "chunk_committed",
            lease,
            rows_ok=stats.rows_ok,
            rows_error=stats.rows_error,
            generated_tokens=stats.generated_tokens,
        )
        for found in self._phases.committed(attempt):
            self._diary.tell(found)
        self._check_errors()

    def _call_off(self, rivals: list[Lease]) -> None:
        """Spare the replicas that are at a chunk that has just been committed."""
        for lease in rivals:
            for slot in self._fleet.slots:
                if slot.name == lease.replica:
                    self._fleet.call_off(slot, lease)

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
            self._diary.say(str(error))
            self.drain()

    # --- bookkeeping -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Report, and ask the replicas for the next report."""
        if self._is_draining and not self._has_told_draining:
            self._tell_draining()
        now_s = time.monotonic()
        if now_s < self._look_due_s:
            return
        self._look_due_s = now_s + LOOK_EVERY_S
        with self._in_storage:
            self._committer.check_lock()
        self._diary.flush()
        self._fleet.poll()
        if not self._is_draining:
            self.recoveries += Recoveries(chunks_copied=self._handout.copies(now_s))
        self._staffing.dismiss(now_s)
        found = self.progress()
        self._on_progress(found)
        if self._placement.look(now_s, self._headcount.num_placed, self._headcount.num_wanted):
            self._stall.look(found)

    def _tell_draining(self) -> None:
        self._has_told_draining = True
        num_leased = self._leases.num_leased
        self._diary.write("job_draining", chunks_in_flight=num_leased)
        if num_leased:
            self._diary.say(
                f"stopping: {num_leased} chunks under way are finished first; a further interrupt "
                "stops at once, which loses those chunks and nothing else"
            )
