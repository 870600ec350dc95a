"""The coordinator: hands out leases, commits what comes back, replaces what dies, and stops.

There is one per job. It is the only committer and the only owner of retries. No row passes through
it, and what it holds does not grow with the rows that are done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from eevp_batch.cluster import rules
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet, Outcome, Slot
from eevp_batch.cluster.leases import Lease, LeaseTable
from eevp_batch.cluster.phases import News, Phases
from eevp_batch.cluster.progress import Meter, Progress, Recoveries
from eevp_batch.errors import JobFailedError, StaleAttemptError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.plan import Plan

MAX_DEATHS_IN_A_ROW = 5
LOOK_EVERY_S = 1.0
_TICK_S = 0.25


class Coordinator:
    """Drives a fleet until every chunk of the plan is committed.

    Args:
        spec: the job.
        plan: its chunks.
        fleet: its replicas, none of them started.
        committer: commits to the job's output.
        events: the job's diary.
        done: ids of the chunks that earlier runs committed.
        totals: what they add up to.
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
        done: set[int],
        totals: ChunkStats,
        on_progress: Callable[[Progress], None],
        on_message: Callable[[str], None],
        phases: Phases,
    ) -> None:
        self._spec, self._plan, self._fleet = spec, plan, fleet
        self._committer, self._events = committer, events
        self._on_progress, self._on_message = on_progress, on_message
        self._phases = phases
        to_do = (chunk_id for chunk_id in phases.order() if chunk_id not in done)
        self._leases = LeaseTable(to_do, len(plan.chunks) - len(done))
        self.totals = totals
        self.recoveries = Recoveries()
        self.num_done_before = len(done)
        self._meter = Meter(totals, time.monotonic())
        self._look_due_s = 0.0
        self._waited_s = self._storage_s = 0.0
        self._is_draining = self._has_told_draining = False

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
        """Whether every chunk of the plan is committed."""
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
            TooManyErrorsError: more rows failed than the job allows.
        """
        rules.check_error_rate(self.totals, self._spec.run.max_error_rate, self._plan.num_rows)
        for news in self._phases.start():
            self._tell(news)
        while not self.is_finished and not (self._is_draining and not self._leases.num_leased):
            self._start_replicas()
            self._hand_out()
            self._ask_to_learn()
            for outcome in self._wait():
                self._take(outcome)
            self._look()
        if self.is_finished:
            self._meter.settle(self.totals)
        self._on_progress(self.progress())

    def progress(self) -> Progress:
        """The job now."""
        now_s = time.monotonic()
        rows_done = self.totals.rows + sum(slot.open_rows for slot in self._fleet.slots)
        elapsed_s = now_s - self._meter.started_s
        return Progress(
            rows_total=self._plan.num_rows,
            rows_done=rows_done,
            rows_error=self.totals.rows_error,
            tokens=self._meter.tokens,
            tokens_per_s=self._meter.tokens_per_s(now_s),
            mean_exit_layer=self._meter.mean_exit_layer,
            eta_s=self._meter.eta_s(rows_done, self._plan.num_rows, now_s),
            elapsed_s=elapsed_s,
            replicas=len(self._fleet.slots),
            replicas_ready=sum(slot.ready is not None for slot in self._fleet.slots),
            chunks_total=len(self._plan.chunks),
            chunks_committed=self.num_committed,
            chunks_leased=self._leases.num_leased,
            chunks_pending=self._leases.num_pending,
            coordinator_s=elapsed_s - self._waited_s - self._storage_s,
            storage_s=self._storage_s,
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
        """Lease pending chunks to the replicas that hold the fewest."""
        if self._is_draining:
            return
        held = {
            slot.index: len(self._leases.leases_of(slot.name))
            for slot in self._fleet.slots
            if slot.ready is not None and not slot.is_learning
        }
        while held and self._leases.num_pending:
            slot = self._fleet.slots[min(held, key=lambda index: held[index])]
            if held[slot.index] >= min(slot.max_leases, self._fair_share()):
                # Replicas that can hold more than this one may still take some.
                del held[slot.index]
                continue
            self._lease(slot)
            held[slot.index] += 1

    def _fair_share(self) -> int:
        """Chunks that a replica may hold so that the last ones spread over all replicas."""
        return math.ceil(self._leases.num_unfinished / len(self._fleet.slots))

    def _lease(self, slot: Slot) -> None:
        lease = self._leases.lease(slot.name, self._phases.phase)
        if lease is None:
            return
        self._write_event(
            "chunk_leased",
            chunk_id=lease.chunk_id,
            epoch=lease.epoch,
            attempt=lease.attempt_no,
            replica=lease.replica,
            phase=lease.phase,
        )
        self._fleet.process(slot, lease, self._plan.chunks[lease.chunk_id])

    def _ask_to_learn(self) -> None:
        """Once there are rows to learn from, the replica that holds the fewest chunks does it."""
        slots = [slot for slot in self._fleet.slots if slot.ready is not None]
        if self._is_draining or not slots or not self._phases.is_learning_due:
            return
        slot = min(slots, key=lambda slot: len(self._leases.leases_of(slot.name)))
        order = self._phases.learn(self._plan.num_rows - self.totals.rows)
        text = f"{slot.name} learns exits from {order.num_rows} rows"
        fields = {"replica": slot.name, "chunks": len(order.chunks)}
        self._tell(News("learning_started", text, fields))
        self._fleet.learn(slot, order)

    # --- taking in -------------------------------------------------------------------------------

    def _take(self, outcome: Outcome) -> None:
        if outcome.lost is not None:
            self._bury(outcome.slot, outcome.lost)
        elif outcome.failed is not None:
            self._take_failure(outcome)
        elif outcome.call == "ready":
            self._take_ready(outcome.slot, outcome.value)
        elif outcome.call == "progress":
            outcome.slot.progress = outcome.value
            if outcome.value.max_resident:  # another engine may hold more or fewer
                outcome.slot.max_leases = rules.max_leases(outcome.value.max_resident, self._plan)
            self._meter.update(outcome.slot.index, outcome.slot.name, outcome.value)
        elif outcome.lease is not None:
            self._commit(outcome.slot, outcome.lease, outcome.value)
        elif outcome.call == "learn":
            outcome.slot.is_learning = False
            self._tell(self._phases.has_learned(outcome.value))

    def _take_failure(self, outcome: Outcome) -> None:
        """End the job for what the code raised, except where a fresh start may help."""
        if outcome.call == "ready" and not outcome.is_ours:
            self._bury(outcome.slot, str(outcome.failed))
        else:
            raise JobFailedError(outcome.failed)

    def _take_ready(self, slot: Slot, ready: Any) -> None:
        slot.ready = ready
        slot.max_leases = rules.max_leases(ready.max_resident, self._plan)
        self._meter.replica_is_ready(time.monotonic())
        self._write_event(
            "replica_ready",
            replica=slot.name,
            pid=ready.pid,
            node_id=ready.node_id,
            max_resident=ready.max_resident,
            leases=slot.max_leases,
            start_s=round(ready.start_s, 3),
            machine=ready.machine,
        )

    def _commit(self, slot: Slot, lease: Lease, attempt: Attempt) -> None:
        # Epochs start at 1: no attempt is of lease 0.
        current_epoch = self._leases.current_epoch(lease.chunk_id) or 0
        try:
            with self._in_storage():
                stats = self._committer.commit(attempt, current_epoch).attempt.stats
        except StaleAttemptError as error:
            self.recoveries += Recoveries(attempts_discarded=1)
            self._write_event("attempt_discarded", **_names(lease), reason=str(error))
            return
        self._leases.commit(lease)
        self.totals += stats
        slot.committed_rows += stats.rows
        for any_slot in self._fleet.slots:
            any_slot.deaths_in_a_row = 0
        self._write_event(
            "chunk_committed",
            **_names(lease),
            rows_ok=stats.rows_ok,
            rows_error=stats.rows_error,
            generated_tokens=stats.generated_tokens,
        )
        for news in self._phases.committed(attempt, self.totals.audit):
            self._tell(news)
        rules.check_error_rate(self.totals, self._spec.run.max_error_rate, self._plan.num_rows)

    # --- deaths ----------------------------------------------------------------------------------

    def _bury(self, slot: Slot, reason: str) -> None:
        """Give a replica up: its chunks are pending again, its slot is free for the next one."""
        name = slot.name
        returned, was_learning = self._leases.release(name), slot.is_learning
        self._fleet.bury(slot)
        slot.deaths_in_a_row += 1
        slot.not_before_s = time.monotonic() + rules.start_delay_s(slot.deaths_in_a_row)
        self.recoveries += Recoveries(replica_deaths=1, chunks_returned=len(returned))
        self._write_event(
            "replica_dead",
            replica=name,
            reason=reason,
            chunks=[lease.chunk_id for lease in returned],
        )
        self._on_message(f"{name} died; {len(returned)} chunks go back: {reason}")
        if slot.deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise JobFailedError(
                f"{slot.deaths_in_a_row} replicas in a row died without a commit; the last one: "
                f"{reason}"
            )
        for news in self._phases.learner_died() if was_learning else ():
            self._tell(news)
        self._check_suspects([lease.chunk_id for lease in returned], reason)

    def _check_suspects(self, chunk_ids: list[int], reason: str) -> None:
        """Give up on chunks that keep company with deaths; bisecting them would begin here."""
        limit = self._spec.run.max_attempts
        suspects = [f"{c:05d}" for c in chunk_ids if self._leases.deaths(c) >= limit]
        if suspects:
            raise JobFailedError(
                f"{limit} replicas died while they held chunk {' or '.join(suspects)} "
                f"(run.max_attempts); the last one: {reason}"
            )

    # --- bookkeeping -----------------------------------------------------------------------------

    def _wait(self) -> Iterator[Outcome]:
        start_s = time.monotonic()
        outcomes = list(self._fleet.wait(_TICK_S))
        self._waited_s += time.monotonic() - start_s
        yield from outcomes

    def _look(self) -> None:
        """Report, and ask the replicas for the next report."""
        if self._is_draining and not self._has_told_draining:
            self._tell_draining()
        if time.monotonic() < self._look_due_s:
            return
        self._look_due_s = time.monotonic() + LOOK_EVERY_S
        self._committer.check_lock()
        self._fleet.poll()
        self._on_progress(self.progress())

    def _tell_draining(self) -> None:
        self._has_told_draining = True
        self._write_event("job_draining", chunks_in_flight=self._leases.num_leased)
        self._on_message(
            f"stopping: {self._leases.num_leased} chunks under way are finished first; interrupt "
            "again to stop at once, which loses those chunks and nothing else"
        )

    def _tell(self, news: News) -> None:
        self._write_event(news.event, **news.fields)
        self._on_message(news.text)

    def _write_event(self, event: str, **fields: Any) -> None:
        with self._in_storage():
            self._events.write(event, **fields)

    @contextmanager
    def _in_storage(self) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._storage_s += time.monotonic() - start_s


def _names(lease: Lease) -> dict[str, Any]:
    return {"chunk_id": lease.chunk_id, "epoch": lease.epoch, "replica": lease.replica}
