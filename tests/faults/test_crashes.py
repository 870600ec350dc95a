"""Nothing is lost, wherever processes die or the power goes: the commit protocol, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from eevp_batch.errors import EevpError
from eevp_batch.storage import layout, local_store
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.commit_record import CommitRecord
from eevp_batch.storage.local_store import LocalStore
from eevp_batch.storage.store import Store
from tests.faults.any_store import WatchedStore
from tests.faults.drawn import draw_histories
from tests.faults.history import Job, Watch, live
from tests.faults.machine import Machine
from tests.faults.sweep import EVERYTHING, SMALL, sweep
from tests.storage.jobs import stores

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
    "lock holder": (*LINKED, "rename to", "unlink"),
}
FOLDERS = (
    *("_eevp", "_eevp/attempts", "_eevp/commits", "_eevp/learned", "_eevp/lock.d"),
    *("data", "errors"),
)
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crash_at_every_point_of_the_protocol(tmp_path: Path) -> None:
    machine = sweep(EVERYTHING, tmp_path, ("kill", "power cut"))
    assert set(machine.crashed) == set(machine.reached), "there was a crash at each point"
    strange = set(machine.crashed) ^ points_of_the_protocol()
    assert not strange, f"the table is not what happens: {sorted(strange)}"
    print(f"{machine.crashed.total()} crashes at {len(machine.crashed)} named points")


@pytest.mark.parametrize("kind", ["subtree", "mock"])
def test_a_crash_around_every_operation_of_a_store_without_a_disk(
    tmp_path: Path, kind: str
) -> None:
    def watch(machine: Machine, folder: Path) -> Watch:
        store = dict(stores(folder))[kind]
        return WatchedStore(machine, lambda: Store(store.filesystem, store.root, store.text))

    machine = sweep(SMALL, tmp_path, ("kill",), watch)
    assert set(machine.crashed) == set(machine.reached), "there was a crash at each point"
    for change in ("create_exclusive plan", "publish data part", "create_exclusive commit record"):
        assert {f"before {change}", f"after {change}"} <= set(machine.crashed)


@pytest.mark.timeout(300)
def test_drawn_histories_end_as_if_undisturbed(capsys: pytest.CaptureFixture[str]) -> None:
    tally = draw_histories(25)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.histories >= 25 and tally.crashed.total() > 25
    assert len(tally.kinds) == 3, "processes were killed and lost, and the power went"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_crash_at_every_point_of_a_repair(tmp_path: Path) -> None:
    def damage(job: Job) -> None:
        live(job)
        out = Path(job.watch.plain().text)
        (out / "data/part-00001.parquet").unlink()
        (out / "errors/part-00000.parquet").write_bytes(b"rot")
        (out / "_eevp/commits/00002.json").write_text("{}")
        job.watch.disk.adopt()
        job.settled.clear()
        job.repairs = True

    machine = sweep(SMALL, tmp_path, ("kill", "power cut"), prepare=damage)
    steps = ("rename to record set aside", "unlink _SUCCESS", "fsync folder _eevp/commits")
    assert {f"before {step}" for step in steps} <= set(machine.crashed)


# --- a protocol that leaves a step out is caught ------------------------------------------------


def move_unsynced(store: LocalStore, src: str, dst: str) -> None:
    store._ensure_folder(dst)
    local_store.os.replace(store.path(src), store.path(dst))


def create_in_place(store: LocalStore, rel: str, data: bytes) -> None:
    if store.exists(rel):
        raise FileExistsError(rel)
    store._put(rel, data)


def record_first(committer: Committer, attempt: Attempt, current_epoch: int) -> CommitRecord:
    record = committer._record(attempt)
    text = record.to_json().encode()
    committer.store.create_exclusive(layout.commit_record(attempt.chunk_id), text)
    committer._publish(attempt.data_path, layout.data_part(attempt.chunk_id), None)
    committer._publish(attempt.errors_path, layout.errors_part(attempt.chunk_id), None)
    return record


SABOTAGE: dict[str, tuple[Any, str, Any]] = {
    "a published name is not synced": (LocalStore, "_move", move_unsynced),
    "a content is not synced": (LocalStore, "_put", Store._put),
    "a record is written in place": (LocalStore, "_create", create_in_place),
    "the record comes before its parts": (Committer, "commit", record_first),
    "nothing is cleaned up": (Committer, "clean_attempts", lambda committer: None),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_protocol_without_one_of_its_steps_is_caught(tmp_path: Path, name: str) -> None:
    with patch.object(*SABOTAGE[name]), pytest.raises((AssertionError, EevpError, OSError)):
        sweep(SMALL, tmp_path, ("power cut", "kill"))
