"""Who works on which chunk: pending, leased with an epoch, or committed. No Ray, no clock.

A chunk is in exactly one of the three states. Each lease of the table carries an epoch of its own,
larger than every earlier one; an attempt counts only while its lease is the current one of its
chunk, so an attempt of a replica that was given up (a zombie) is told apart by its epoch alone.

Committed chunks are counted, not kept: what the table holds is bounded by what is leased, plus one
small entry for each chunk that has been on a replica that died.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from eevp_batch.errors import StaleAttemptError
from eevp_batch.records import Phase


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one replica to make one attempt at one chunk.

    Attributes:
        epoch: 1.. and unique over all leases of the table.
        attempt_no: 1 for the first attempt at the chunk in this run.
        replica: name of the replica that holds it.
        phase: how the attempt is to be made.
    """

    chunk_id: int
    epoch: int
    attempt_no: int
    replica: str
    phase: Phase = "exits"


class LeaseTable:
    """Leases chunks in order of their ids, returned ones first.

    Args:
        chunk_ids: the chunks to do, ascending; read lazily, so it may be a generator.
        num_chunks: how many ids `chunk_ids` yields.
    """

    def __init__(self, chunk_ids: Iterable[int], num_chunks: int) -> None:
        self._untouched = iter(chunk_ids)
        self._num_untouched = num_chunks
        self._returned: list[int] = []
        self._leased: dict[int, Lease] = {}
        self._held: dict[str, dict[int, Lease]] = {}
        self._deaths: dict[int, int] = {}
        self._next_epoch = 1
        self.num_committed = 0

    @property
    def num_pending(self) -> int:
        return self._num_untouched + len(self._returned)

    @property
    def num_leased(self) -> int:
        return len(self._leased)

    @property
    def num_unfinished(self) -> int:
        return self.num_pending + self.num_leased

    def lease(self, replica: str, phase: Phase = "exits") -> Lease | None:
        """Lease the next pending chunk to `replica`; None when nothing is pending."""
        if self._returned:
            chunk_id = heapq.heappop(self._returned)
        elif self._num_untouched:
            chunk_id = next(self._untouched)
            self._num_untouched -= 1
        else:
            return None
        lease = Lease(chunk_id, self._next_epoch, 1 + self.deaths(chunk_id), replica, phase)
        self._next_epoch += 1
        self._leased[chunk_id] = lease
        self._held.setdefault(replica, {})[chunk_id] = lease
        return lease

    def current_epoch(self, chunk_id: int) -> int | None:
        """Epoch of the chunk's lease; None while it is not leased."""
        lease = self._leased.get(chunk_id)
        return lease.epoch if lease else None

    def leases_of(self, replica: str) -> list[Lease]:
        """What `replica` holds, oldest first."""
        return list(self._held.get(replica, {}).values())

    def commit(self, lease: Lease) -> None:
        """Settle a lease whose attempt is committed.

        Raises:
            StaleAttemptError: the lease is not the current one of its chunk.
        """
        if self._leased.get(lease.chunk_id) != lease:
            raise StaleAttemptError(
                f"chunk {lease.chunk_id:05d}: the attempt of epoch {lease.epoch} "
                f"({lease.replica}) is stale; current: {self.current_epoch(lease.chunk_id)}"
            )
        del self._leased[lease.chunk_id], self._held[lease.replica][lease.chunk_id]
        self._deaths.pop(lease.chunk_id, None)
        self.num_committed += 1

    def release(self, replica: str) -> list[Lease]:
        """Take back every lease of a replica that died; its chunks are pending again."""
        leases = list(self._held.pop(replica, {}).values())
        for lease in leases:
            del self._leased[lease.chunk_id]
            self._deaths[lease.chunk_id] = self.deaths(lease.chunk_id) + 1
            heapq.heappush(self._returned, lease.chunk_id)
        return leases

    def deaths(self, chunk_id: int) -> int:
        """How many replicas died in this run while they held the chunk."""
        return self._deaths.get(chunk_id, 0)
