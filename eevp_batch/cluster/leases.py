"""Who works on which chunk: pending, leased with an epoch, or committed. No Ray, no clock.

A chunk is in exactly one of the three states. Each lease of the table carries an epoch of its own,
larger than every earlier one; an attempt counts only while its lease is a current one of its chunk,
so an attempt of a replica that was given up (a zombie) is told apart by its epoch alone. A chunk
has one current lease, or two while a replica that had nothing else to do runs a *copy* of it
(`stragglers`): the first of them to be committed ends both.

A chunk that was on several replicas that died is a *suspect*: it is leased alone, to a replica that
holds nothing else, so that the next death says something about it (`bisection`).

Committed chunks are counted, not kept: what the table holds is bounded by what is leased, plus one
small entry for each chunk that has been on a replica that died.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from eevp_batch.errors import StaleAttemptError
from eevp_batch.records import Phase

SUSPECT_AFTER = 2
"""Deaths in company after which a chunk is leased alone."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one replica to make one attempt at one chunk.

    Attributes:
        epoch: 1.. and unique over all leases of the table.
        attempt_no: 1 for the first attempt at the chunk in this run, copies counted.
        replica: name of the replica that holds it.
        phase: how the attempt is to be made.
        is_alone: whether the chunk is a suspect, and the replica holds nothing else.
        is_copy: whether another replica held the chunk already.
    """

    chunk_id: int
    epoch: int
    attempt_no: int
    replica: str
    phase: Phase = "exits"
    is_alone: bool = False
    is_copy: bool = False


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
        self._suspects: list[int] = []
        self._reserved: set[str] = set()
        self._phases: dict[int, Phase] = {}
        self._leased: dict[int, list[Lease]] = {}
        self._held: dict[str, dict[int, Lease]] = {}
        self._deaths: dict[int, int] = {}
        self._next_epoch = 1
        self.num_committed = 0

    @property
    def num_pending(self) -> int:
        return self._num_untouched + len(self._returned) + len(self._suspects)

    @property
    def num_leased(self) -> int:
        return len(self._leased)

    @property
    def num_unfinished(self) -> int:
        return self.num_pending + self.num_leased

    def lease(self, replica: str, phase: Phase = "exits") -> Lease | None:
        """Lease the next pending chunk to `replica`.

        Returns:
            None when nothing is pending, while the replica holds a suspect, and while it is to get
            empty for one: as many replicas as there are suspects waiting.
        """
        held = self._held.get(replica, {})
        if any(lease.is_alone for lease in held.values()):
            return None
        if self._suspects and not held:
            self._reserved.discard(replica)
            return self._grant(heapq.heappop(self._suspects), replica, phase, is_alone=True)
        if self._is_reserved(replica):
            return None
        if self._returned:
            chunk_id = heapq.heappop(self._returned)
        elif self._num_untouched:
            chunk_id = next(self._untouched)
            self._num_untouched -= 1
        else:
            return None
        return self._grant(chunk_id, replica, phase, is_alone=False)

    def _is_reserved(self, replica: str) -> bool:
        """Keep as many replicas for suspects as there are suspects, this one if need be."""
        if len(self._reserved) > len(self._suspects):
            self._reserved.discard(replica)
        elif len(self._reserved) < len(self._suspects):
            self._reserved.add(replica)
        return replica in self._reserved

    def _grant(self, chunk_id: int, replica: str, phase: Phase, *, is_alone: bool) -> Lease:
        current = self._leased.setdefault(chunk_id, [])
        lease = Lease(
            chunk_id=chunk_id,
            epoch=self._next_epoch,
            attempt_no=1 + self.deaths(chunk_id) + len(current),
            replica=replica,
            phase=self._phases.get(chunk_id, phase),
            is_alone=is_alone,
            is_copy=bool(current),
        )
        self._next_epoch += 1
        current.append(lease)
        self._held.setdefault(replica, {})[chunk_id] = lease
        return lease

    def can_copy(self, lease: Lease) -> bool:
        """Whether a second replica may do the chunk as well: nobody does yet, and it is no suspect.

        What kills has to be seen to kill alone.
        """
        is_suspect = self.deaths(lease.chunk_id) >= SUSPECT_AFTER
        return self._leased.get(lease.chunk_id) == [lease] and not is_suspect

    def copy(self, lease: Lease, replica: str) -> Lease:
        """Lease a chunk that may be copied to a second replica, which holds nothing, as well."""
        return self._grant(lease.chunk_id, replica, lease.phase, is_alone=False)

    def rivals(self, lease: Lease) -> list[Lease]:
        """The other current leases of the chunk."""
        return [other for other in self._leased.get(lease.chunk_id, []) if other != lease]

    def is_current(self, lease: Lease) -> bool:
        """Whether an attempt under the lease still counts."""
        return lease in self._leased.get(lease.chunk_id, [])

    def current_epoch(self, chunk_id: int) -> int | None:
        """Epoch of the chunk's oldest lease; None while it is not leased."""
        leases = self._leased.get(chunk_id)
        return leases[0].epoch if leases else None

    def leases_of(self, replica: str) -> list[Lease]:
        """What `replica` holds, oldest first."""
        return list(self._held.get(replica, {}).values())

    def num_held(self, replica: str) -> int:
        """How many leases `replica` holds."""
        return len(self._held.get(replica, ()))

    def commit(self, lease: Lease) -> None:
        """Settle a lease whose attempt is committed; a rival ends with it.

        Raises:
            StaleAttemptError: the lease is not a current one of its chunk.
        """
        rivals = self.rivals(lease)
        for ended in (lease, *rivals):
            self._end(ended)
        self._deaths.pop(lease.chunk_id, None)
        self._phases.pop(lease.chunk_id, None)
        self.num_committed += 1

    def put_back(self, lease: Lease) -> None:
        """End a suspect's lease that gave a piece of it; the other pieces get the same phase.

        Raises:
            StaleAttemptError: the lease is not a current one of its chunk.
        """
        self._end(lease)
        self._phases[lease.chunk_id] = lease.phase
        heapq.heappush(self._suspects, lease.chunk_id)

    def release(self, replica: str) -> list[Lease]:
        """Take back every lease of a replica that died; its chunks are pending again."""
        leases = list(self._held.pop(replica, {}).values())
        self._reserved.discard(replica)
        for lease in leases:
            self._deaths[lease.chunk_id] = self.deaths(lease.chunk_id) + 1
            self._return(lease)
        return leases

    def give_back(self, lease: Lease) -> bool:
        """Take back one lease of a replica that lives; nothing is held against its chunk.

        Returns:
            Whether the lease was a current one.
        """
        if not self.is_current(lease):
            return False
        del self._held[lease.replica][lease.chunk_id]
        self._return(lease)
        return True

    def _return(self, lease: Lease) -> None:
        """End a lease; its chunk is pending unless another replica has a copy."""
        current = self._leased[lease.chunk_id]
        current.remove(lease)
        if current:
            return
        del self._leased[lease.chunk_id]
        is_suspect = self.deaths(lease.chunk_id) >= SUSPECT_AFTER
        heapq.heappush(self._suspects if is_suspect else self._returned, lease.chunk_id)

    def _end(self, lease: Lease) -> None:
        if not self.is_current(lease):
            raise StaleAttemptError(
                f"chunk {lease.chunk_id:05d}: the attempt of epoch {lease.epoch} "
                f"({lease.replica}) is stale; current: {self.current_epoch(lease.chunk_id)}"
            )
        self._leased[lease.chunk_id].remove(lease)
        if not self._leased[lease.chunk_id]:
            del self._leased[lease.chunk_id]
        del self._held[lease.replica][lease.chunk_id]

    def deaths(self, chunk_id: int) -> int:
        """How many replicas died in this run while they held the chunk."""
        return self._deaths.get(chunk_id, 0)
