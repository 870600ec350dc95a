"""One machine with several processes, any of which may die at a named point of what it does.

A *point* lies before, in the middle of, or after one operation on storage. Every process runs in
the thread of the test, one after the other; `acting_as` says which one it is. A process that has
died can do nothing more: each further operation of its `finally` and `except` blocks dies too.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "power cut", "lost"]


class Died(BaseException):
    """The process is gone, as by SIGKILL; nothing may catch it."""


@dataclass(frozen=True)
class Crash:
    """What happens at the `at`-th point, from 1, after a run's start or the last crash in it.

    `kill` ends the process that reaches it; `power cut` ends all of them and takes what was never
    synced; `lost` cuts the network between the coordinator and the replica that reaches it or the
    next point in a replica, which goes on writing.
    """

    at: int
    kind: Kind = "kill"


@dataclass(eq=False)
class Process:
    """One process: the coordinator's, or a replica's."""

    name: str
    is_replica: bool = False
    is_dead: bool = False
    is_lost: bool = False


class Machine:
    """Counts points, and lets processes die at those that were ordered.

    Attributes:
        reached: how often each named point was reached.
        crashed: how often a crash happened there.
        stretches: the names of all points in order, cut at each crash and at each start of a run.
        kinds: how often which kind of crash happened.
        crashes_left: those that have not happened yet, in order.
        is_down: no power, until `boot`.
    """

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.crashed: Counter[str] = Counter()
        self.kinds: Counter[Kind] = Counter()
        self.stretches: list[list[str]] = [[]]
        self.is_down = False
        self.crashes_left: list[Crash] = []
        self._acting: list[Process] = []
        self._thread = threading.get_ident()

    def boot(self, crashes: Sequence[Crash]) -> None:
        """Begin a run of the job, in which the first of these crashes will happen.

        Where the run goes on after it, the second one happens too, and so on.
        """
        self.is_down = False
        self.crashes_left = list(crashes)
        if self.stretches[-1]:
            self.stretches.append([])

    @property
    def process(self) -> Process:
        """The one that is acting."""
        return self._acting[-1]

    @contextmanager
    def acting_as(self, process: Process) -> Iterator[None]:
        """Whatever the block does, this process does."""
        self._acting.append(process)
        try:
            self.check_alive()
            yield
        finally:
            self._acting.pop()

    def check_alive(self) -> None:
        """Die if the process is dead already; outside of all processes nothing dies."""
        if self._acting and (self.is_down or self.process.is_dead):
            raise Died

    def point(self, name: str) -> None:
        """Be at a point, and die there if that was ordered."""
        if not self._acting or threading.get_ident() != self._thread:
            return
        self.check_alive()
        self.stretches[-1].append(name)
        self.reached[name] += 1
        if self._is_due:
            self.crashed[name] += 1
            self.stretches.append([])
            self._strike(self.crashes_left.pop(0).kind)

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """One operation, with a point before it and one after it."""
        self.point(f"before {name}")
        yield
        self.point(f"after {name}")

    @property
    def _is_due(self) -> bool:
        if not self.crashes_left or len(self.stretches[-1]) < self.crashes_left[0].at:
            return False
        return self.process.is_replica or self.crashes_left[0].kind != "lost"

    def _strike(self, kind: Kind) -> None:
        self.kinds[kind] += 1
        if kind == "lost":
            self.process.is_lost = True
            return
        self.is_down = kind == "power cut"
        self.process.is_dead = True
        raise Died
