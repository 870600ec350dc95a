"""Nothing is lost, wherever processes die or the power goes: the commit protocol, step by step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from eevp_batch.storage import local_store
from eevp_batch.storage.local_store import LocalStore
from eevp_batch.storage.store import Store
from tests.faults.any_store import WatchedStore
from tests.faults.drawn import draw_histories
from tests.faults.history import Job, Output, Setting, Watch, live
from tests.faults.local import WatchedDisk
from tests.faults.machine import Crash, Kind, Machine
from tests.storage.jobs import stores

def watch_disk(machine: Machine, folder: Path) -> Watch:
    return WatchedDisk(machine, str(folder / "out"))


# Learns exits, audits them and stops them; rows of three kinds of errors; chunks with and without.
EVERYTHING = Setting(
    files=(9, 7),
    chunk_rows=2,
    mode="audited",
    failing=frozenset({0, 1, 2, 7}),
    empty=frozenset({4}),
)

STEPS = ("create", "in write", "write", "fsync", "unlink")
WHOLE = tuple(f"{step} temporary" for step in STEPS)
RENAMED = (*WHOLE, "rename to")
LINKED = (*WHOLE, "link")
PROTOCOL = {
    "plan": LINKED,
    "resolved job": RENAMED,
    "attempt data": (*RENAMED, "unlink"),
    "attempt errors": (*RENAMED, "unlink"),
    "data part": ("rename to", "unlink"),
    "errors part": ("rename to", "unlink"),
    "commit record": LINKED,
    "attempt of learned exits": (*RENAMED, "unlink"),
    "learned exits": ("rename to", "unlink"),
    "learned record": LINKED,
    "exits stopped": RENAMED,
    "_SUCCESS": RENAMED,
    "events": ("create", "write", "in write"),
    "lock": ("create",),
}
FOLDERS = ("_eevp", "_eevp/attempts", "_eevp/commits", "_eevp/learned", "data", "errors")
"""Each operation of the protocol; a point lies before and after it, in a write also within it."""


def points_of_the_protocol() -> set[str]:
    """Names of all points, by the table above."""
    operations = [f"{do} {what}" for what, steps in PROTOCOL.items() for do in steps]
    operations += [f"{do} folder {name}" for name in (*FOLDERS, ".") for do in ("mkdir", "fsync")]
    operations.append("fsync folder above")
    return {
        name
        for operation in operations
        for name in (
            [operation]
            if operation.startswith("in ")
            else [f"before {operation}", f"after {operation}"]
        )
    }


def sweep(
    setting: Setting,
    folder: Path,
    kinds: Sequence[Kind],
    make_watch: Callable[[Machine, Path], Watch] = watch_disk,
) -> Machine:
    """A history for each named point, in which there is a crash; the kinds take turns.

    Points that only a run after a crash reaches are found on the way: their histories are those
    that led there, with one crash more.
    """
    machine, numbers = Machine(), itertools.count()

    def lived(crashes: Sequence[Crash]) -> tuple[Output, list[str]]:
        place = folder / f"history {next(numbers)}"
        place.mkdir()
        machine.stretches = [[]]
        job = Job(setting, place, machine, watch=make_watch(machine, place))
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


@pytest.mark.parametrize("kinds", [("kill", "power cut"), ("power cut", "kill")], ids=str)
def test_a_crash_at_every_point_of_the_protocol(tmp_path: Path, kinds: tuple[Kind, ...]) -> None:
    machine = sweep(EVERYTHING, tmp_path, kinds)
    assert set(machine.crashed) == set(machine.reached), "there was a crash at each point"
    strange = set(machine.crashed) ^ points_of_the_protocol()
    assert not strange, f"the table is not what happens: {sorted(strange)}"
    print(f"{machine.crashed.total()} crashes at {len(machine.crashed)} named points")
