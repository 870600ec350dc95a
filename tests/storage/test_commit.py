"""Publish, then record: one commit, and what may be handed over for it. Crashes: tests/faults."""

from __future__ import annotations

import errno
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.errors import EngineError, JobFailedError, StaleAttemptError, VerifyFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Attempt, CommitRecord, Committer, write_attempt
from eevp_batch.storage.plan import Plan, make_plan, open_plan
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.storage.jobs import (
    MODEL,
    attempt_chunk,
    is_failing,
    make_spec,
    results,
    run_job,
    snapshot,
    write_input,
)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    ids = [f"row {number}" for number in range(7)]
    failing = [row for row in map("failed {}".format, range(40)) if is_failing(row)][:4]
    fine = [row for row in map("fine {}".format, range(40)) if not is_failing(row)][:4]
    # Chunks of four rows: mixed ones, one without errors, one with nothing else, and a short one.
    return make_spec(write_input(tmp_path / "in.parquet", fine + failing + ids))


@pytest.fixture
def expected(tmp_path: Path, spec: JobSpec) -> dict[str, bytes]:
    """The parts of a run that nothing interrupts."""
    store = Store.open(tmp_path / "uninterrupted")
    run_job(store, spec)
    parts = snapshot(store)
    assert {"data/part-00001.parquet", "errors/part-00000.parquet"}.isdisjoint(parts), (
        "one chunk has no generations, and one no errors"
    )
    return parts


def assert_finished(store: Store, expected: dict[str, bytes], where: str) -> None:
    assert snapshot(store) == expected, f"{where}: the parts are those of an uninterrupted run"
    assert verify(store).problems == [], f"{where}: the output verifies"
    for folder in ("_eevp/attempts", "_eevp/tmp"):
        assert store.list(folder) == [], f"{where}: no attempt is left"
    for folder in ("data", "errors", "_eevp", "_eevp/commits"):
        left = [name for name in store.list(folder) if name.endswith(".tmp")]
        assert left == [], f"{where}: no temporary file is left in {folder}"


def test_committed_parts_are_untouched_by_a_resume(
    tmp_path: Path, spec: JobSpec, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    store = Store.open(out)
    plan = open_plan(store, make_plan(spec, MODEL))
    for chunk in plan.chunks[1:3]:
        Committer(store, plan).commit(attempt_chunk(store, plan, spec, chunk), 1)
    before = {path: path.stat() for path in out.glob("*/part-*")}
    run_job(Store.open(out), spec)
    for path, stat in before.items():
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ino) == (stat.st_mtime_ns, stat.st_ino), (
            f"{path} was committed before the resume and is not rewritten"
        )
    assert snapshot(Store.open(out)) == expected


def test_deleted_records_make_exactly_their_chunks_run_again(
    tmp_path: Path, spec: JobSpec, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    run_job(Store.open(out), spec)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/part-*")}
    for chunk_id in (0, 2):
        (out / f"_eevp/commits/{chunk_id:05d}.json").unlink()
    run_job(Store.open(out), spec)
    rewritten = {path.stem[-5:] for path, then in before.items() if path.stat().st_mtime_ns > then}
    assert rewritten == {"00000", "00002"}, "chunks rewritten = chunks missing"
    assert_finished(Store.open(out), expected, "after deleting two records")


# --- one commit ------------------------------------------------------------


@pytest.fixture
def job(store: Store, spec: JobSpec) -> tuple[Store, Plan]:
    return store, open_plan(store, make_plan(spec, MODEL))


def test_a_stale_attempt_is_discarded(job: tuple[Store, Plan], spec: JobSpec) -> None:
    store, plan = job
    stale = attempt_chunk(store, plan, spec, plan.chunks[2], epoch=1)
    with pytest.raises(StaleAttemptError, match="00002"):
        Committer(store, plan).commit(stale, current_epoch=2)
    assert store.list("_eevp/attempts") == [], "its files are gone"
    assert snapshot(store) == {} and store.list("_eevp/commits") == []


def test_a_chunk_is_committed_once(job: tuple[Store, Plan], spec: JobSpec) -> None:
    store, plan = job
    committer = Committer(store, plan)
    first = attempt_chunk(store, plan, spec, plan.chunks[2], epoch=1)
    second = attempt_chunk(store, plan, spec, plan.chunks[2], epoch=2)
    record = committer.commit(first, 1)
    parts = snapshot(store)
    with pytest.raises(StaleAttemptError, match="committed already"):
        committer.commit(second, 2)
    assert snapshot(store) == parts, "the second attempt changes nothing"
    assert store.list("_eevp/attempts") == []
    assert committer.commit(first, 1) == record, "the same attempt again is answered the same"


def test_a_zombie_never_shares_a_file_with_the_next_lease(
    job: tuple[Store, Plan], spec: JobSpec
) -> None:
    store, plan = job
    paths = [attempt_chunk(store, plan, spec, plan.chunks[2], epoch=1).paths for _ in range(2)]
    assert set(paths[0]).isdisjoint(paths[1])


@pytest.mark.parametrize("failing", ["publish", "create_exclusive", "delete"])
def test_a_commit_may_be_tried_again_after_an_error(
    job: tuple[Store, Plan], spec: JobSpec, expected: dict[str, bytes], failing: str
) -> None:
    store, plan = job
    for chunk in plan.chunks:
        attempt = attempt_chunk(store, plan, spec, chunk)
        for at in (1, 2):
            flaky = type(store)(store.filesystem, store.root, store.text)
            calls = itertools.count(1)
            operation = getattr(flaky, failing)

            def fail(*args: Any, at: int = at, calls: Any = calls, op: Any = operation) -> Any:
                op(*args, **({"missing_ok": True} if failing == "delete" else {}))
                if next(calls) == at:
                    raise OSError(errno.EIO, "the network is gone")

            setattr(flaky, failing, lambda *a, fail=fail, **_: fail(*a))
            with pytest.MonkeyPatch.context():
                try:
                    Committer(flaky, plan).commit(attempt, 1)
                except OSError:
                    continue
        Committer(store, plan).commit(attempt, 1)
    assert snapshot(store) == expected


WRONG = ["rows", "generations", "id digest", "not in the plan", "is gone"]


def wrong_attempts(attempt: Attempt) -> dict[str, Attempt]:
    return {
        "rows": replace(attempt, rows_ok=attempt.rows_ok + 1),
        "generations": replace(attempt, generations=attempt.generations + 1),
        "id digest": replace(attempt, id_digest="0" * 64),
        "not in the plan": replace(attempt, chunk_id=99),
        "is gone": replace(attempt, data_path="_eevp/attempts/elsewhere.parquet"),
    }


@pytest.mark.parametrize("words", WRONG)
def test_an_attempt_that_is_not_its_chunk_is_refused(
    job: tuple[Store, Plan], spec: JobSpec, words: str
) -> None:
    store, plan = job
    attempt = attempt_chunk(store, plan, spec, plan.chunks[0])
    with pytest.raises(JobFailedError, match=words):
        Committer(store, plan).commit(wrong_attempts(attempt)[words], 1)
    assert store.list("_eevp/commits") == [], "nothing is recorded"


def test_attempts_and_records_survive_json(job: tuple[Store, Plan], spec: JobSpec) -> None:
    store, plan = job
    attempt = attempt_chunk(store, plan, spec, plan.chunks[2])
    assert Attempt.from_json(attempt.to_json()) == attempt
    record = Committer(store, plan).commit(attempt, 1)
    assert CommitRecord.from_json(record.to_json()) == record
    assert list(Committer(store, plan).records()) == [record]
    with pytest.raises(JobFailedError, match="damaged"):
        CommitRecord.from_json(record.to_json()[:-9])


def test_totals_are_the_sum_of_the_attempts(job: tuple[Store, Plan], spec: JobSpec) -> None:
    store, plan = job
    committer, total = Committer(store, plan), ChunkStats()
    for chunk in plan.chunks:
        total += committer.commit(attempt_chunk(store, plan, spec, chunk), 1).attempt.stats
    assert committer.totals() == total
    assert total.rows == plan.num_rows
    assert committer.committed() == {chunk.chunk_id for chunk in plan.chunks}


def test_an_unfinished_job_is_not_called_done(job: tuple[Store, Plan], spec: JobSpec) -> None:
    store, plan = job
    committer = Committer(store, plan)
    for chunk in plan.chunks[1:]:
        committer.commit(attempt_chunk(store, plan, spec, chunk), 1)
    with pytest.raises(VerifyFailedError, match=r"commits/00000\.json"):
        committer.finish({})
    assert not store.exists("_SUCCESS")


# --- what a replica may hand over ------------------------------------------------------------


@pytest.mark.parametrize("change", ["lost", "twice", "both", "unknown", "lost sample", "no result"])
def test_rows_that_are_not_accounted_for_are_refused(tmp_path: Path, change: str) -> None:
    ids = [row for row in map("row {}".format, range(20)) if not is_failing(row)][:3]
    ids.append(next(row for row in map("bad {}".format, range(99)) if is_failing(row)))
    spec = make_spec(write_input(tmp_path / "in.parquet", ids), num_samples=2)
    plan, store = make_plan(spec, MODEL), Store.open(tmp_path / "out")
    source = read_chunk(plan, plan.chunks[0], ["prompt"])
    done, failed = results(plan, table_ids(source, plan, "input"))
    if change == "lost":
        done = [g for g in done if g.row_id != ids[0]]
    elif change == "twice":
        done.append(done[0])
    elif change == "both":
        failed.append(replace(failed[0], row_id=ids[0]))
    elif change == "unknown":
        failed.append(replace(failed[0], row_id="nobody"))
    elif change == "lost sample":
        done.pop()
    else:
        failed.clear()
    with pytest.raises(EngineError, match=r"row '.*', sample [01]: found"):
        write_attempt(store, plan, spec, plan.chunks[0], 1, 1, source, done, failed, "replica", 1.0)
    assert store.list("_eevp/attempts") == [], "nothing is written"
