"""A crash at each named point once: all that the protocol does, one step after the other."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.history import Job, Output, Setting, Watch, live
from tests.faults.local import WatchedDisk
from tests.faults.machine import Crash, Kind, Machine

# Learns exits, audits them and stops them; rows of three kinds of errors; chunks with and without.
EVERYTHING = Setting(
    files=(9, 7),
    chunk_rows=3,
    mode="audited",
    failing=frozenset({0, 1, 2, 7}),
    empty=frozenset({4}),
)

SMALL = Setting(files=(3, 2), chunk_rows=2, failing=frozenset({0, 4}))


def watch_disk(machine: Machine, folder: Path) -> Watch:
    return WatchedDisk(machine, str(folder / "out"))


def sweep(
    setting: Setting,
    folder: Path,
    kinds: Sequence[Kind],
    make_watch: Callable[[Machine, Path], Watch] = watch_disk,
    prepare: Callable[[Job], None] = lambda job: None,
) -> Machine:
    """A history for each named point, in which there is a crash; the kinds take turns.

    Points that only a run after a crash reaches are found on the way: their histories are those
    that led there, with one crash more. `prepare` is done before any crash.
    """
    machine, numbers = Machine(), itertools.count()

    def lived(crashes: Sequence[Crash]) -> tuple[Output, list[str]]:
        place = folder / f"history {next(numbers)}"
        place.mkdir()
        job = Job(setting, place, machine, watch=make_watch(machine, place))
        prepare(job)
        machine.stretches = [[]]
        live(job, crashes)
        return job.output(), machine.stretches[len(crashes)]

    expected, stretch = lived([])
    waiting, known = deque([((), stretch)]), set[str]()
    kind = itertools.cycle(kinds)
    while waiting:
        before, stretch = waiting.popleft()
        for at, name in enumerate(stretch, start=1):
            if name not in known:
                known.add(name)
                crashes = (*before, Crash(at, next(kind)))
                found, rest = lived(crashes)
                assert found == expected, f"the output is another one after {crashes}, at {name}"
                waiting.append((crashes, rest))
    return machine
