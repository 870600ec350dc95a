"""Error rows that are tried again are patched in once, wherever a process dies."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import JobFailedError, StaleAttemptError
from eevp_batch.records import RowId
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Committer, write_attempt
from eevp_batch.storage.patches import find_patches, read_failures
from eevp_batch.storage.plan import make_plan, read_plan
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.faults.any_store import WatchedStore
from tests.faults.machine import Crash, Died, Machine, Process
from tests.storage.jobs import MODEL, generation, is_failing, make_spec, run_job, write_input
from tests.storage.retrying import patch_attempt, redone_but, retry

# Chunks of four rows: two with error rows among others, one of error rows only, one without any.
_FAILING = [row for row in map("failing {}".format, range(60)) if is_failing(row)][:7]
_FINE = [row for row in map("fine {}".format, range(60)) if not is_failing(row)][:9]
FAILED = _FAILING
IDS = [_FINE[0], *_FAILING[:2], _FINE[1], *_FAILING[2:6], *_FINE[2:8], _FAILING[6], _FINE[8]]
HOPELESS = [_FAILING[0], _FAILING[3]]
REDO = redone_but(HOPELESS, num_samples=2)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(write_input(tmp_path / "in.parquet", IDS), num_samples=2)


@pytest.fixture
def out(tmp_path: Path, spec: JobSpec) -> Path:
    """A finished job with rows in error."""
    folder = tmp_path / "out"
    run_job(Store.open(folder), spec)
    assert len(list(folder.glob("errors/*"))) == 3
    return folder


def rows_there(out: Path) -> tuple[Counter[Any], Counter[Any]]:
    """Every (row, sample) in data/ and every row in errors/, as a reader of the folders counts."""
    done = [row for path in out.glob("data/part-*") for row in pq.read_table(path).to_pylist()]
    failed = [row for path in out.glob("errors/part-*") for row in pq.read_table(path).to_pylist()]
    samples = Counter((row["row_id"], row["sample_index"]) for row in done)
    return samples, Counter(row["row_id"] for row in failed)


def assert_exact(out: Path, in_error: Sequence[RowId], where: str) -> None:
    """Every row once, in the folders, the records, `_SUCCESS` and `verify`."""
    done, failed = rows_there(out)
    assert failed == Counter(in_error), f"{where}: the rows in error"
    expected = Counter((row, n) for row in IDS if row not in in_error for n in range(2))
    assert done == expected, f"{where}: the rows that came out"
    assert verify(Store.open(out)).problems == [], where
    totals = read_status(Store.open(out)).totals
    assert (totals.rows_ok, totals.rows_error) == (len(IDS) - len(in_error), len(in_error)), where
    assert totals.error_classes.total() == len(in_error), where
    left = [*out.glob("*/.*.tmp"), *out.glob("_eevp/*/.*.tmp"), *out.glob("_eevp/attempts/*")]
    assert not left, f"{where}: {left} is left"


def test_a_retry_patches_rows_in_and_leaves_the_parts_alone(out: Path, spec: JobSpec) -> None:
    data = {path: path.read_bytes() for path in out.glob("data/*")}
    retry(Store.open(out), spec, REDO)
    assert_exact(out, HOPELESS, "after one retry")
    assert data.items() <= {path: path.read_bytes() for path in out.glob("data/*")}.items()
    for _ in range(2):
        retry(Store.open(out), spec, REDO)
        assert_exact(out, HOPELESS, "after another")
    rows = [row for path in out.glob("errors/*") for row in pq.read_table(path).to_pylist()]
    assert {row["attempts"] for row in rows} == {4}, "each retry counts as an attempt"


def retried_until_death(out: Path, spec: JobSpec, at: int) -> bool:
    """Retry in a process that dies at its `at`-th point; whether it came to its end before."""
    machine = Machine()
    machine.boot([Crash(at)])
    store = WatchedStore(machine, lambda: Store.open(out)).store()
    try:
        with machine.acting_as(Process("retry")):
            retry(store, spec, REDO)
    except Died:
        return False
    return True


def test_a_crash_around_every_operation_of_a_retry(out: Path, spec: JobSpec) -> None:
    for at in itertools.count(1, 2):  # before each operation
        folder = out.parent / f"crash {at}"
        shutil.copytree(out, folder)
        where = f"dead at step {at}"
        if retried_until_death(folder, spec, at):
            break
        report = Committer(Store.open(folder), read_plan(Store.open(folder))).totals()
        assert report.rows == len(IDS), f"{where}: the records count each row once"
        if at % 4 == 1:  # the job itself is run again, or the retry is
            run_job(Store.open(folder), spec)
            in_error = sorted(rows_there(folder)[1])
            assert set(HOPELESS) <= set(in_error) <= set(FAILED), where
            assert_exact(folder, in_error, where)
        retry(Store.open(folder), spec, REDO)
        assert_exact(folder, HOPELESS, where)
    assert at > 30, "the walk covered attempts, parts, records and deletions"


def test_every_crash_of_a_retry_may_be_followed_by_another(out: Path, spec: JobSpec) -> None:
    for steps in itertools.count(6, 3):
        if retried_until_death(out, spec, steps):
            break
    assert steps > 30
    assert_exact(out, HOPELESS, f"after crashes up to step {steps}")


def test_a_patch_is_committed_once(out: Path, spec: JobSpec) -> None:
    store = Store.open(out)
    plan = read_plan(store)
    committer = Committer(store, plan)
    patch = next(find_patches(committer))
    first = patch_attempt(store, plan, spec, patch, REDO)
    second = patch_attempt(store, plan, spec, patch, REDO)
    assert committer.commit(first, 1) == committer.commit(first, 1)
    with pytest.raises(StaleAttemptError, match=r"\.r1\.json"):
        committer.commit(second, 1)
    with pytest.raises(StaleAttemptError, match="lease 1 came during lease 2"):
        late = next(find_patches(committer))
        committer.commit(patch_attempt(store, plan, spec, late, REDO), 2)


def test_a_patch_that_accounts_for_other_rows_is_refused(out: Path, spec: JobSpec) -> None:
    store = Store.open(out)
    plan = read_plan(store)
    committer = Committer(store, plan)
    patch = next(patch for patch in find_patches(committer) if patch.num_rows > 1)
    chunk = plan.chunks[patch.chunk_id]
    source = read_chunk(plan, chunk, ["prompt"])
    row = read_failures(store, patch)[0].row_id
    number = table_ids(source, plan, "input").index(row)
    part = source.take([number])
    done = [generation(row, n) for n in range(2)]
    less = write_attempt(store, plan, spec, chunk, 1, 1, part, done, [], "r", 1.0, patch=1)
    with pytest.raises(JobFailedError, match="rows: found 1; allowed: "):
        committer.commit(less, 1)
    assert not list(out.glob("data/*.r1.*")), "nothing is published"


def test_a_patch_whose_chunk_lost_its_record_goes_with_it(out: Path, spec: JobSpec) -> None:
    retry(Store.open(out), spec, REDO)
    patched = next(out.glob("_eevp/commits/*.r1.json"))
    (patched.parent / patched.name.replace(".r1", "")).unlink()
    problems = verify(Store.open(out)).problems
    assert any("a patch of what is not recorded" in problem for problem in problems)
    run_job(Store.open(out), spec)
    chunk_id = int(patched.name[:5])
    in_error = [
        row
        for row in FAILED
        if row in HOPELESS or IDS.index(row) // spec.run.chunk_rows == chunk_id
    ]
    assert_exact(out, in_error, "after the chunk was done again")


def test_verify_sees_an_error_row_that_was_patched_and_is_still_there(
    out: Path, spec: JobSpec
) -> None:
    before = {path: path.read_bytes() for path in out.glob("errors/*")}
    retry(Store.open(out), spec, REDO)
    for path, content in before.items():
        path.write_bytes(content)
    problems = verify(Store.open(out)).problems
    assert len(problems) == len(before), problems
    assert all("no commit record names this file" in problem for problem in problems)
    run_job(Store.open(out), spec)
    assert_exact(out, HOPELESS, "once the job was run again")


def test_verify_sees_a_patch_that_was_altered(out: Path, spec: JobSpec) -> None:
    retry(Store.open(out), spec, REDO)
    part = next(out.glob("data/*.r1.parquet"))
    part.write_bytes(part.read_bytes()[:-20] + bytes(20))
    problems = "\n".join(verify(Store.open(out)).problems)
    assert "the checksum is not the recorded one" in problems and part.name in problems


def test_classes_choose_what_is_tried_again(out: Path, spec: JobSpec) -> None:
    committer = Committer(Store.open(out), make_plan(spec, MODEL))
    patches = list(find_patches(committer))
    assert sum(patch.num_rows for patch in patches) == len(FAILED)
    assert list(find_patches(committer, ["RowTimeoutError"])) == []
    assert list(find_patches(committer, ["EmptyPromptError", "Other"])) == patches


def test_names_of_parts_and_records_read_back() -> None:
    for chunk_id, patch in ((0, 0), (12, 1), (123456, 20)):
        for name in (layout.data_part(chunk_id, patch), layout.errors_part(chunk_id, patch)):
            assert layout.part_key(name.rpartition("/")[2]) == (chunk_id, patch)
        record = layout.commit_record(chunk_id, patch).rpartition("/")[2]
        assert layout.record_key(record) == (chunk_id, patch)
        assert layout.record_chunk_id(record) == (None if patch else chunk_id)
    for name in ("00001.r0.json", "00001.r01.json", "0001.json", "00001.r1.json.tmp"):
        assert layout.record_key(name) is None
