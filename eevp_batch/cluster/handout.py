"""Who gets what next: pending chunks, copies of the last ones, exits to learn. Ends nothing."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from eevp_batch.cluster import news, stragglers
from eevp_batch.cluster.backlog import Backlog, ChunkTask
from eevp_batch.cluster.diary import Diary
from eevp_batch.cluster.fleet import Fleet, Slot
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.stragglers import Holding, Straggler


class Handout:
    """Gives leases to replicas.

    Args:
        fleet: the replicas.
        backlog: what there is to do.
        phases: how a chunk is to be done.
        diary: is told of each lease.
    """

    def __init__(self, fleet: Fleet, backlog: Backlog, phases: Phases, diary: Diary) -> None:
        self._fleet, self._backlog, self._phases = fleet, backlog, phases
        self._diary, self._leases = diary, backlog.leases
        self._num_sharing = 1

    def pending(self) -> None:
        """Lease pending chunks to the replicas that hold the fewest."""
        if not self._leases.num_pending:
            return
        present = sum(s.handle is not None and not s.is_leaving for s in self._fleet.slots)
        self._num_sharing = max(1, present)
        share = self._fair_share()
        with_room = [
            (held, slot.index, slot)
            for slot in self._fleet.slots
            if slot.can_work
            and (held := self._leases.num_held(slot.name)) < min(slot.max_leases, share)
        ]
        heapq.heapify(with_room)
        while with_room and self._leases.num_pending:
            held, index, slot = heapq.heappop(with_room)
            # Where it gets nothing, others may: one that holds less may be kept for a suspect.
            if self._lease(slot) and held + 1 < min(slot.max_leases, share):
                heapq.heappush(with_room, (held + 1, index, slot))

    def refill(self, slots: Iterable[Slot]) -> None:
        """Lease pending chunks to some replicas, whoever else may have room.

        Args:
            slots: of those that have just finished something.
        """
        for slot in slots:
            most = min(slot.max_leases, self._fair_share()) if slot.can_work else 0
            while self._leases.num_held(slot.name) < most and self._lease(slot):
                pass

    def copies(self, now_s: float) -> int:
        """Let idle replicas do the last chunks as well where they should be faster.

        Args:
            now_s: monotonic time.

        Returns:
            How many copies were begun.
        """
        if self._leases.num_pending:
            return 0
        workers = [slot for slot in self._fleet.slots if slot.ready is not None]
        idle = [s for s in workers if s.can_work and not self._leases.num_held(s.name)]
        usual = stragglers.usual_speed(slot.pace for slot in workers) if idle else None
        if usual is None:
            return 0
        holdings = (self._holding(slot) for slot in workers)
        left = [
            straggler
            for straggler in stragglers.expected(holdings, usual, now_s)
            if self._leases.can_copy(straggler.lease)
        ]
        num_begun = 0
        for slot in idle:
            found = stragglers.worth_copying(left, slot.pace.rows_per_s or usual)
            if found is not None:
                left.remove(found)
                self._copy(slot, found)
                num_begun += 1
        return num_begun

    def learning(self, rows_left: int) -> None:
        """Once there are rows to learn from, the replica that holds the fewest chunks does it.

        Args:
            rows_left: rows that are not committed yet.
        """
        if self._backlog.is_retry or not self._phases.is_learning_due:
            return
        slots = [slot for slot in self._fleet.slots if slot.can_work]
        if not slots:
            return
        slot = min(slots, key=lambda slot: self._leases.num_held(slot.name))
        order = self._phases.learn(rows_left)
        self._diary.tell(news.learning_started(slot.name, order))
        self._fleet.learn(slot, order)

    def _fair_share(self) -> int:
        """Chunks a replica may hold so that the last ones spread over all that have a place."""
        return math.ceil(self._leases.num_unfinished / self._num_sharing)

    def _lease(self, slot: Slot) -> bool:
        found = self._backlog.lease(slot.name, self._phases.phase)
        if found is not None:
            self._send(slot, *found)
        return found is not None

    def _copy(self, slot: Slot, straggler: Straggler) -> None:
        lease, task = self._backlog.copy(straggler.lease, slot.name)
        self._send(slot, lease, task)

    def _send(self, slot: Slot, lease: Lease, task: ChunkTask) -> None:
        self._diary.write("chunk_leased", **news.lease_fields(lease, task.span))
        self._fleet.process(slot, lease, task)

    def _holding(self, slot: Slot) -> Holding:
        leases = self._leases.leases_of(slot.name)
        sized = [(lease, self._backlog.num_rows(lease.chunk_id)) for lease in leases]
        return Holding(slot.pace, sized, slot.open_rows)
