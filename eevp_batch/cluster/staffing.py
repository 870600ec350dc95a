"""Starts replicas, and empties the slots of those that die, leave or are not needed any more."""

from __future__ import annotations

import time

from eevp_batch.cluster import news
from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.deaths import DeathWatch
from eevp_batch.cluster.diary import Diary
from eevp_batch.cluster.fleet import Fleet, Slot
from eevp_batch.cluster.headcount import Headcount
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.progress import Recoveries

_AFTER_LEAVING_S = 1.0
"""A replica that was told to end is replaced no sooner, in case whoever tells it tells the next."""


class Staffing:
    """Does what the headcount says, and settles what a replica that goes has left.

    Args:
        fleet: the replicas.
        headcount: who is to be there.
        backlog: gets back what a replica held.
        phases: hears of a replica that was learning.
        deaths: counts deaths.
        diary: is told.
    """

    def __init__(
        self,
        fleet: Fleet,
        headcount: Headcount,
        backlog: Backlog,
        phases: Phases,
        deaths: DeathWatch,
        diary: Diary,
    ) -> None:
        self._fleet, self._headcount, self._backlog = fleet, headcount, backlog
        self._phases, self._deaths, self._diary = phases, deaths, diary

    def start(self, now_s: float) -> None:
        """Start those that there is work for.

        Args:
            now_s: monotonic time.
        """
        for slot in self._headcount.to_start(now_s):
            self._fleet.start(slot)

    def release_leavers(self) -> Recoveries:
        """Let those go that were told to end and hold nothing any more."""
        found = Recoveries()
        for slot in self._fleet.slots:
            if slot.is_leaving and not self._backlog.leases.num_held(slot.name):
                found += self.let_go(slot, "its process was told to end")
        return found

    def let_go(self, slot: Slot, reason: str) -> Recoveries:
        """Empty the slot of a replica that was told to end; its chunks bear no blame."""
        leases, name, was_learning = self._backlog.leases, slot.name, slot.is_learning
        given_back = [lease for lease in leases.leases_of(name) if leases.give_back(lease)]
        self._fleet.bury(slot)
        slot.not_before_s = time.monotonic() + _AFTER_LEAVING_S
        self._diary.tell(news.left(name, reason, given_back))
        self._tell_learner_died(was_learning)
        return Recoveries(replicas_left=1, chunks_returned=len(given_back))

    def dismiss(self, now_s: float) -> None:
        """Give the places back of those that there is nothing left to do for; call it often.

        Args:
            now_s: monotonic time.
        """
        for slot in self._headcount.to_leave(now_s):
            name, was_placed = slot.name, slot.handle is not None
            self._fleet.bury(slot)
            if was_placed:
                told = news.left(name, "nothing is left for it to do", ())
                self._diary.write(told.event, **told.fields)

    def bury(self, slot: Slot, reason: str) -> Recoveries:
        """Give a replica up: its chunks are pending again, its slot is free for the next one.

        Raises:
            JobFailedError: the next one would die as well.
        """
        name, was_learning = slot.name, slot.is_learning
        returned, set_aside = self._backlog.release(name, reason)
        self._fleet.bury(slot)
        chunks = [lease.chunk_id for lease in returned]
        self._diary.write("replica_dead", replica=name, reason=reason, chunks=chunks)
        self._diary.say(f"{name} died; {len(chunks)} chunks go back: {reason}")
        tried_suspect = any(lease.is_alone for lease in returned)
        self._deaths.died(slot, reason, tried_suspect=tried_suspect)
        for found in set_aside:
            self._diary.tell(found)
        self._tell_learner_died(was_learning)
        return Recoveries(
            replica_deaths=1, chunks_returned=len(returned), rows_set_aside=len(set_aside)
        )

    def _tell_learner_died(self, was_learning: bool) -> None:
        for found in self._phases.learner_died() if was_learning else ():
            self._diary.tell(found)
