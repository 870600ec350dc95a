"""How many replicas a job has: as many as there is work for, at most one for each slot. No Ray.

A replica is asked for as soon as there is a chunk for it and starts when Ray has a place for it, so
that a job begins with what there is and grows as nodes come. Towards the end replicas that have
nothing left to do leave; one stays, in case another one dies or falls behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eevp_batch.cluster.fleet import Slot
from eevp_batch.cluster.leases import LeaseTable

IDLE_S = 10.0
"""Seconds for which a replica has had nothing to do when it leaves."""


class Headcount:
    """Says who is to start and who is to leave.

    Args:
        slots: of the fleet.
        leases: who holds what.
    """

    def __init__(self, slots: Sequence[Slot], leases: LeaseTable) -> None:
        self._slots, self._leases = slots, leases

    @property
    def num_present(self) -> int:
        """Replicas that work, start or wait for a place."""
        return sum(not slot.is_empty for slot in self._slots)

    @property
    def num_placed(self) -> int:
        """Replicas that have a place."""
        return sum(slot.handle is not None for slot in self._slots)

    @property
    def num_wanted(self) -> int:
        """Replicas that there is work for: those that have some, and one for each pending chunk."""
        num_busy = sum(self._is_busy(slot) for slot in self._slots)
        return min(len(self._slots), num_busy + self._leases.num_pending)

    def to_start(self, now_s: float) -> Iterator[Slot]:
        """Empty slots that are to be filled now.

        Args:
            now_s: monotonic time.
        """
        missing = self.num_wanted - self.num_present
        for slot in self._slots:
            if missing > 0 and slot.is_empty and slot.not_before_s <= now_s:
                missing -= 1
                yield slot

    def to_leave(self, now_s: float) -> list[Slot]:
        """Slots that are to be emptied, for there is nothing left to do for them; call it often.

        Args:
            now_s: monotonic time.
        """
        if self._leases.num_pending:
            for slot in self._slots:
                slot.idle_since_s = None
            return []
        idle = [slot for slot in self._slots if not slot.is_empty and not self._is_busy(slot)]
        since_s = {slot: slot.idle_since_s or now_s for slot in idle}
        for slot in self._slots:
            slot.idle_since_s = since_s.get(slot)
        placed = [slot for slot in idle if slot.handle is not None]
        # The one that stays is one that could work at once, if there is one.
        spare = next((slot for slot in placed if slot.ready is not None), None)
        return [
            slot
            for slot in idle
            if slot.handle is None
            or (slot is not spare and now_s - (slot.idle_since_s or now_s) >= IDLE_S)
        ]

    def _is_busy(self, slot: Slot) -> bool:
        return slot.is_learning or self._leases.num_held(slot.name) > 0
