"""Which of the last chunks an idle replica had better do as well. Arithmetic; no Ray, no clock.

Once nothing is pending, a job takes as long as its slowest replica needs for what it holds. A
replica that has nothing to do then takes a *copy* of the chunk that is expected to be finished
last, if it is expected to be faster; whichever of the two is committed first counts, the other is
called off.
A chunk is copied whole, not split: a replica that hangs, swaps or sits behind a slow disk cannot be
asked to give half of a chunk away, and two leases of one chunk need nothing of the commit protocol
that a zombie does not need already.

What is expected: a replica goes on at its own mean speed, and one that has finished no row for some
time is quiet for as long again (of LATE, Zaharia et al., OSDI 2008, and of the Lindy rule).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eevp_batch.cluster.leases import Lease

MARGIN = 1.25
"""A copy has to be expected to win by this factor, for guesses are rough."""


@dataclass(slots=True)
class Pace:
    """How fast one replica finishes rows.

    Attributes:
        rows: finished while it was watched.
        busy_s: seconds between hearings in which it held chunks or finished rows.
        moved_s: when a row was last finished, or it last held nothing; monotonic time.
    """

    rows: int = 0
    busy_s: float = 0.0
    moved_s: float | None = None
    _finished_rows: int = 0
    _heard_s: float | None = None

    def heard(self, finished_rows: int, is_busy: bool, now_s: float) -> None:
        """Take in how many rows the replica has finished.

        Args:
            finished_rows: so far; fewer than before where a chunk was called off.
            is_busy: whether it holds chunks.
            now_s: monotonic time.
        """
        finished = finished_rows - self._finished_rows
        if self._heard_s is not None and (is_busy or finished > 0):
            self.busy_s += now_s - self._heard_s
        if finished > 0 or not is_busy or self.moved_s is None:
            self.moved_s = now_s
        self.rows += max(0, finished)
        self._finished_rows, self._heard_s = finished_rows, now_s

    @property
    def rows_per_s(self) -> float | None:
        """Mean speed; None before the first row."""
        return self.rows / self.busy_s if self.rows and self.busy_s > 0 else None

    def quiet_s(self, now_s: float) -> float:
        """For how long no row was finished."""
        return 0.0 if self.moved_s is None else now_s - self.moved_s


@dataclass(frozen=True, slots=True)
class Holding:
    """What one replica holds.

    Attributes:
        leases: with the rows of each, oldest first, which is the order in which they are done.
        open_rows: finished rows of these.
    """

    pace: Pace
    leases: Sequence[tuple[Lease, int]]
    open_rows: int


@dataclass(frozen=True, slots=True)
class Straggler:
    """A lease that is still to be finished.

    Attributes:
        rows: of its chunk.
        left_s: seconds until it is expected to be finished.
    """

    lease: Lease
    rows: int
    left_s: float


def usual_speed(paces: Iterable[Pace]) -> float | None:
    """Median rows per second of the replicas that have finished any; None where none has."""
    known = [speed for pace in paces if (speed := pace.rows_per_s) is not None]
    return statistics.median(known) if known else None


def expected(holdings: Iterable[Holding], usual: float, now_s: float) -> list[Straggler]:
    """All leases by the time at which they are expected to be finished, the last one first.

    Args:
        holdings: of all replicas.
        usual: rows per second of a replica of which nothing is known.
        now_s: monotonic time.
    """
    found = []
    for holding in holdings:
        speed = holding.pace.rows_per_s or usual
        quiet_s, rows_left = holding.pace.quiet_s(now_s), -holding.open_rows
        for lease, rows in holding.leases:
            rows_left += rows
            found.append(Straggler(lease, rows, max(rows_left / speed, quiet_s)))
    return sorted(found, key=lambda straggler: straggler.left_s, reverse=True)


def worth_copying(stragglers: Iterable[Straggler], speed: float) -> Straggler | None:
    """The one that will be finished last of those that a replica would have finished before.

    Args:
        stragglers: the last one first.
        speed: rows per second of the replica that would copy.
    """
    for straggler in stragglers:
        if MARGIN * straggler.rows / speed < straggler.left_s:
            return straggler
    return None
