"""One coordinator to a folder, on whatever storage and from whatever machine."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.errors import JobFailedError, UsageError
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.holder import Holder
from eevp_batch.storage.lock import LockTimes
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from tests.s3_server import S3Server
from tests.storage.conftest import QUICK
from tests.storage.jobs import MODEL, attempt_chunk, make_spec, snapshot, stores, write_input

FILES = "lock.d"
# A machine that is busy for a minute must not make a living holder look dead.
LIVELY = LockTimes(beat_s=0.1, hold_s=60.0, silent_s=120.0, settle_s=0.1)
HASTY = LockTimes(beat_s=0.1, hold_s=0.3, silent_s=0.6, settle_s=0.1)
NEVER = LockTimes(beat_s=1000.0, hold_s=2000.0, silent_s=3000.0, settle_s=0.1)


@pytest.fixture(params=["shared disk", "s3", "mock"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Storage on which no file can be locked."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    kind = {"shared disk": "local", "s3": "s3", "mock": "mock"}[request.param]
    found: Store = (
        request.getfixturevalue("s3_store") if kind == "s3" else dict(stores(tmp_path))[kind]
    )
    found.patience, found.lock_times = QUICK, LIVELY
    return found


def elsewhere(**fields: Any) -> Holder:
    """A holder on another machine."""
    return replace(Holder.here(None), host="elsewhere", kernel="another", pid=42, **fields)


def same_folder(store: Store, times: LockTimes) -> Store:
    """The folder as another process sees it."""
    other = store.with_patience(store.patience)
    other.lock_times = times
    return other


def test_a_second_process_is_refused_while_the_first_one_lives(store: Store) -> None:
    assert store.is_locked("lock") is None
    with store.lock("lock") as held:
        held.check()
        assert store.is_locked("lock") is True
        with pytest.raises(UsageError, match=r"another process is running a job here: process \d+"):
            same_folder(store, LIVELY).lock("lock").__enter__()
        held.check()
    assert store.is_locked("lock") is False
    with same_folder(store, NEVER).lock("lock"):
        assert store.list(FILES) == ["000002.json"], "who has let go is not waited for"


def test_a_silent_holder_is_taken_to_be_dead(store: Store) -> None:
    store.write(f"{FILES}/000007.json", elsewhere().to_bytes())
    assert store.is_locked("lock") is True, "its last heartbeat is fresh"
    store.write(f"{FILES}/000007.json", elsewhere(unix_s=1.0).to_bytes())
    assert store.is_locked("lock") is False, "it was watched, and did not move"
    store.lock_times = HASTY
    with store.lock("lock") as held:
        assert store.list(FILES) == ["000008.json"]
        held.check()


def test_a_living_holder_with_a_wrong_clock_is_not_taken_to_be_dead(store: Store) -> None:
    has_ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not has_ended.wait(0.1):
            beats += 1
            holder = elsewhere(beats=beats, unix_s=1e10 if beats % 2 else 1.0)
            store.write(f"{FILES}/000001.json", replace(holder, owner="x").to_bytes())

    thread = threading.Thread(target=beat)
    store.write(f"{FILES}/000001.json", elsewhere(unix_s=1.0).to_bytes())
    thread.start()
    try:
        watching = same_folder(store, replace(LIVELY, beat_s=60.0))
        assert watching.is_locked("lock") is True
        with pytest.raises(UsageError, match="process 42 on elsewhere"):
            store.lock("lock").__enter__()
    finally:
        has_ended.set()
        thread.join()


def test_a_file_of_another_version_is_watched_too(store: Store) -> None:
    store.write(f"{FILES}/000001.json", b'{"of": "another version"}')
    assert store.is_locked("lock") is False
    store.lock_times = HASTY
    with store.lock("lock"):
        assert store.list(FILES) == ["000002.json"]


def test_nobody_waits_for_the_dead_of_this_machine(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    store.write(f"{FILES}/000001.json", replace(Holder.here(None), pid=process.pid).to_bytes())
    store.lock_times = replace(NEVER, silent_s=1e6)  # the test would never end
    assert store.is_locked("lock") is False
    with store.lock("lock"):
        assert store.list(FILES) == ["000002.json"]


def test_a_holder_that_was_stopped_for_too_long_finds_out(store: Store) -> None:
    stopped = same_folder(store, replace(HASTY, beat_s=1000.0))
    with stopped.lock("lock") as before:
        before.check()
        store.lock_times = HASTY
        with store.lock("lock") as now:
            with pytest.raises(JobFailedError, match=r"process \d+ on .* has taken this folder"):
                before.check()
            now.check()
        assert store.is_locked("lock") is False
    assert store.list(FILES) == ["000002.json"], "it leaves the other's lock alone"


@pytest.mark.parametrize("store", ["shared disk", "s3"], indirect=True)
def test_of_many_newcomers_one_gets_in(store: Store) -> None:
    start, has_ended = threading.Barrier(6), threading.Event()
    inside, refused = [], []

    def enter(number: int) -> None:
        with ExitStack() as stack:
            start.wait()
            try:
                stack.enter_context(same_folder(store, LIVELY).lock("lock"))
            except UsageError:
                refused.append(number)
                return
            inside.append(number)
            has_ended.wait()

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while len(inside) + len(refused) < 6:
        time.sleep(0.01)
    has_ended.set()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and len(refused) == 5


def test_a_holder_waits_for_storage_to_come_back(s3: S3Server, s3_store: Store) -> None:
    s3_store.lock_times = HASTY
    with s3_store.lock("lock") as held:
        s3.faults.at_random(1.0, ("503",), 0)
        time.sleep(2 * HASTY.hold_s)
        threading.Timer(0.5, s3.faults.heal).start()
        held.check()
        assert not s3.faults.injected, "the check came back when storage did"
        assert held.lost_to is None


def test_a_coordinator_that_lost_its_folder_changes_nothing(store: Store, tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", [f"row {n}" for n in range(8)]))
    plan = open_plan(store, make_plan(spec, MODEL))
    committer = Committer(store, plan)
    attempts = [attempt_chunk(store, plan, spec, chunk) for chunk in plan.chunks]
    store.lock_times = replace(LIVELY, hold_s=0.0)  # so that every check looks
    with committer.lock():
        committer.commit(attempts[0], 1)
        assert read_status(store).state == "running"
        before = snapshot(store)
        store.write("_eevp/lock.d/000002.json", elsewhere().to_bytes())
        for act in (lambda: committer.commit(attempts[1], 1), lambda: committer.finish({})):
            with pytest.raises(JobFailedError, match="process 42 on elsewhere has taken"):
                act()
    assert snapshot(store) == before
    assert store.list("_eevp/commits") == ["00000.json"]


def test_nothing_is_tried_again_once_the_folder_is_lost(
    s3: S3Server, s3_store: Store, tmp_path: Path
) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", [f"row {n}" for n in range(8)]))
    plan = open_plan(s3_store, make_plan(spec, MODEL))
    committer = Committer(s3_store, plan)
    attempt = attempt_chunk(s3_store, plan, spec, plan.chunks[0])
    s3_store.lock_times = replace(LIVELY, hold_s=0.0)
    s3.faults.plan("PUT", "commits/00000", *["503"] * 10_000)
    after = threading.Thread(target=take_over_once_it_fails, args=(s3, s3_store))
    with committer.lock():
        after.start()
        with pytest.raises(JobFailedError, match="process 42 on elsewhere has taken"):
            committer.commit(attempt, 1)
    after.join()
    assert s3_store.list("_eevp/commits") == []


def take_over_once_it_fails(s3: S3Server, store: Store) -> None:
    while not s3.faults.injected:
        time.sleep(0.001)
    store.write("_eevp/lock.d/000002.json", elsewhere().to_bytes())
