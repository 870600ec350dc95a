"""Bugs that Hadoop's and Spark's committers had for years, each as a test by name."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eevp_batch.cluster.leases import LeaseTable
from eevp_batch.errors import ResumeRefusedError, StaleAttemptError, UsageError
from eevp_batch.spec import JobSpec
from eevp_batch.storage import commit
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import Plan, make_plan, open_plan
from eevp_batch.storage.status import read_events, read_status
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.faults.history import Job, Setting, live
from tests.faults.local import WatchedDisk
from tests.faults.machine import Crash, Machine
from tests.storage.jobs import (
    MODEL,
    attempt_chunk,
    make_spec,
    run_job,
    snapshot,
    write_input,
)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(write_input(tmp_path / "in.parquet", [f"row {row}" for row in range(10)]))


def planned(store: Store, spec: JobSpec) -> tuple[Plan, Committer]:
    plan = open_plan(store, make_plan(spec, MODEL))
    return plan, Committer(store, plan)


# --- same-second jobs ----------------------------------------------------------------------------


def test_jobs_of_one_second_share_nothing(
    tmp_path: Path, spec: JobSpec, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPARK-33402: job ids made of the clock were equal when two jobs began in one second."""
    for clock, now in (("time", 1e9), ("time_ns", 10**18), ("monotonic", 5.0)):
        monkeypatch.setattr(time, clock, lambda now=now: now)
    plans = [make_plan(spec, MODEL) for _ in range(50)]
    assert len({plan.run_id for plan in plans}) == 50, "Ray's names are made of the run id"
    assert len({store.temporary_name("_eevp/plan.json") for _ in range(50)}) == 50
    plan, _ = planned(store, spec)
    paths = [attempt_chunk(store, plan, spec, plan.chunks[0]).data_path for _ in range(20)]
    assert len(set(paths)) == 20, "two replicas that hold the same epoch write two files"
    writers = [type(store)(store.filesystem, store.root, store.text) for _ in range(5)]
    for number, writer in enumerate(writers):
        writer.append_line("_eevp/events.jsonl", f'{{"event": "{number}"}}')
    assert {event["event"] for event in read_events(store)} == set("01234"), "no line is lost"


def test_two_jobs_that_meet_in_one_folder_are_told_apart(spec: JobSpec, store: Store) -> None:
    first, second = make_plan(spec, MODEL), make_plan(spec, MODEL)
    sampling = spec.sampling.model_copy(update={"seed": 7})
    other = make_plan(spec.model_copy(update={"sampling": sampling}), MODEL)
    assert open_plan(store, first).run_id == first.run_id
    assert open_plan(store, second).run_id == first.run_id, "the same job again takes up the first"
    with pytest.raises(ResumeRefusedError, match=r"sampling\.seed"):
        open_plan(store, other)


# --- zombies -------------------------------------------------------------------------------------


def test_a_zombie_that_finishes_after_a_newer_attempt_was_committed(
    spec: JobSpec, store: Store
) -> None:
    """The late attempt of a task that was committed already must not replace its output."""
    plan, committer = planned(store, spec)
    table = LeaseTable([0], 1)
    old = table.lease("replica-0")
    assert old is not None
    assert table.release("replica-0") == [old]
    new = table.lease("replica-1")
    assert new is not None and new.epoch > old.epoch
    committer.commit(attempt_chunk(store, plan, spec, plan.chunks[0], new.epoch), new.epoch)
    table.commit(new)
    parts, records = snapshot(store), store.list("_eevp/commits")
    zombie = attempt_chunk(store, plan, spec, plan.chunks[0], old.epoch)
    for epoch in (0, new.epoch, old.epoch):  # whatever the coordinator takes to be current
        with pytest.raises(StaleAttemptError):
            committer.commit(zombie, epoch)
    assert snapshot(store) == parts and store.list("_eevp/commits") == records
    assert store.list("_eevp/attempts") == [], "its files are gone"


# --- committed, but not reported -----------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["after link commit record", "after unlink temporary commit record"]
)
@pytest.mark.parametrize("kind", ["kill", "power cut"])
def test_a_chunk_that_was_committed_and_not_reported_is_not_done_again(
    tmp_path: Path, point: str, kind: str
) -> None:
    """MAPREDUCE-5485: the job's master died between the commit and the news of it."""
    setting = Setting(files=(9,), chunk_rows=3, replicas=1)
    undisturbed = Job(setting, tmp_path / "undisturbed", Machine())
    live(undisturbed)
    at = 1 + undisturbed.machine.stretches[0].index(point)
    job = Job(setting, tmp_path / "job", Machine())
    assert not job.run([Crash(at, "kill")]), "the coordinator died"
    (recorded,) = [path.stem for path in (tmp_path / "job/out/_eevp/commits").glob("0*.json")]
    assert not list(event for event in job.events() if event["event"] == "chunk_committed")
    # The record counts from the moment that a resume has seen it: then power cuts do not take it.
    if kind == "power cut":
        job.run([Crash(40, "power cut")])
    live(job)
    leased = [event["chunk_id"] for event in job.events() if event["event"] == "chunk_leased"]
    assert leased.count(int(recorded)) <= 1, "the chunk is not done again"
    assert job.output() == undisturbed.output()


def test_the_news_of_a_commit_may_come_twice(spec: JobSpec, store: Store) -> None:
    plan, committer = planned(store, spec)
    attempt = attempt_chunk(store, plan, spec, plan.chunks[0])
    record = committer.commit(attempt, 1)
    parts = snapshot(store)
    assert committer.commit(attempt, 1) == record
    assert snapshot(store) == parts and committer.totals().rows == 4, "the rows count once"


# --- whitespace in paths -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [" a b ", "tab\there", "line\nbreak", "# %41 ü", "'\"$HOME`;", "~"]
)
def test_whitespace_and_worse_in_paths(tmp_path: Path, name: str) -> None:
    """A path is neither split nor decoded nor expanded on its way."""
    ids = [f"row {row}" for row in range(6)]
    source = write_input(tmp_path / name / f"{name}.parquet", ids)
    store = Store.open(tmp_path / name / f"{name} out")
    run_job(store, make_spec(source))
    assert verify(store).problems == []
    assert [path.name for path in (tmp_path / name).iterdir() if path.is_dir()] == [f"{name} out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "nothing lies elsewhere"


# --- two coordinators at once --------------------------------------------------------------------


def test_a_second_coordinator_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    """MAPREDUCE-4832: a master that had lost its lease went on committing beside its successor."""
    job = Job(Setting(files=(9,), chunk_rows=3), tmp_path, Machine())
    second = Job(Setting(files=(9,), chunk_rows=3), tmp_path, Machine())
    assert not job.run([Crash(60)]), "the first one is under way, with a chunk or an attempt"
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with Committer(job.watch.plain(), make_plan(job.spec, MODEL)).lock():
        with pytest.raises(UsageError, match="another process is running a job here"):
            second.run()
        now = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        changed = {path for path in now if now[path] != before.get(path)}
        assert all(path.relative_to(tmp_path).parts[2].startswith("lock") for path in changed)


def test_where_no_lock_holds_the_record_admits_one_of_two(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path / "out")
    plan, first = planned(store, spec)
    second = Committer(store, plan)
    ours = attempt_chunk(store, plan, spec, plan.chunks[0])
    theirs = attempt_chunk(store, plan, spec, plan.chunks[0])
    # The second looks for a record before the first has one, and creates its own after that.
    monkeypatch.setattr(commit, "read_record", lambda *_: None)
    first.commit(ours, 1)
    with pytest.raises(FileExistsError, match="exists already"):
        second.commit(theirs, 1)
    monkeypatch.undo()
    (record,) = first.records()
    assert record.attempt.data_path is not None
    assert store.sha256(record.attempt.data_path) == record.attempt.data_sha256
    assert first.totals().rows == plan.chunks[0].num_rows, "the rows count once"


# --- clocks --------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(files=(9, 5), chunk_rows=3, failing=frozenset({2}), mode="learning")
    expected = Job(setting, tmp_path / "a", Machine())
    live(expected)
    ticks: Iterator[float] = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(ticks) * 1e9))
    job = Job(setting, tmp_path / "b", Machine())
    live(job, [Crash(100), Crash(80, "power cut"), Crash(60)])
    assert job.output() == expected.output()
    assert read_status(job.watch.plain()).state == "done"


def test_the_order_of_events_is_not_that_of_the_clock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(10**18, -(10**9))
    monkeypatch.setattr(time, "time_ns", lambda: next(ticks))
    for number in range(12):
        writer = type(store)(store.filesystem, store.root, store.text)
        writer.append_line("_eevp/events.jsonl", f'{{"event": "{number}"}}')
    assert [int(event["event"]) for event in read_events(store)] == list(range(12))


# --- what was taken back -------------------------------------------------------------------------


def test_a_power_cut_does_not_bring_back_what_was_taken_back(tmp_path: Path) -> None:
    """A `_SUCCESS` that no longer holds, or a part without a record, must not rise again."""
    for seed in range(20):
        watch = WatchedDisk(Machine(), str(tmp_path / f"{seed}"))
        store = watch.store()
        with watch.interposed():
            store.write("_SUCCESS", b"{}")
            store.write("data/part-00000.parquet", b"PAR1")
            store.delete("_SUCCESS")
            store.delete("data/part-00000.parquet", missing_ok=True)
        watch.lose_power(random.Random(seed))
        assert not watch.plain().exists("_SUCCESS")
        assert not watch.plain().exists("data/part-00000.parquet")
