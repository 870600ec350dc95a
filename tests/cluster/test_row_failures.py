"""Rows that fail, rows that kill, and what trying them again makes of it; on a real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from eevp_batch.cluster.bisection import row_deaths
from eevp_batch.cluster.leases import SUSPECT_AFTER
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.errors import TooManyErrorsError
from eevp_batch.storage.status import read_status
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script, exits_of

pytestmark = pytest.mark.ray


def assert_accounted(job: Job, in_error: set[int], num_rows: int) -> None:
    """Each row stands in the output or in the error table, once, and nothing else is there."""
    assert [row["row_id"] for row in job.rows()] == [
        r for r in range(num_rows) if r not in in_error
    ]
    for row in job.rows():
        assert row["token_ids"] == [exit.token_id for exit in exits_of(row["row_id"], 0)]
    assert [row["row_id"] for row in job.errors()] == sorted(in_error)
    assert not job.problems()
    totals = read_status(job.store).totals
    assert (totals.rows_ok, totals.rows_error) == (num_rows - len(in_error), len(in_error))


def test_a_row_that_kills_is_set_aside_and_may_be_tried_again(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    run = {"max_attempts": 2, "max_error_rate": 0.05}
    job = make_job(tmp_path, prompts=32, chunk_rows=4, run=run)
    killing = Script(killing=frozenset({14}), max_resident=4)
    result = job.run(killing)
    assert_accounted(job, {14}, 32)
    (error,) = job.errors()
    assert error["error_class"] == "ReplicaDiedError" and "2 replicas in a row" in error["message"]
    assert error["attempts"] == row_deaths(2) == 2
    levels = 2  # of a chunk of 4 rows
    assert result.recoveries.replica_deaths <= SUSPECT_AFTER + levels + row_deaths(2)
    assert result.recoveries.rows_set_aside == len(job.events("row_set_aside")) == 1
    assert len(list((job.out / "data").iterdir())) == 8, "a chunk is one part, however it was run"
    pieces = (job.out / "_eevp" / "attempts").glob("00003.*")
    assert not list(pieces), "the pieces of the chunk are left"
    assert any("is set aside" in message for message in job.messages)

    parts = job.parts()
    again = job.run(Script(), retry=[])
    assert again.recoveries.replica_deaths == 0 and again.totals.rows_error == 0
    assert_accounted(job, set(), 32)
    assert [path.name for path in (job.out / "data").glob("*.r*")] == ["part-00003.r1.parquet"]
    changed = {name for name in parts if parts[name] != job.parts().get(name)}
    assert changed == {"errors/00003"}, "a committed part was touched"
    assert (job.out / "_SUCCESS").exists()


def test_error_rows_are_retried_by_class_again_and_again(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    prompts = [None if row == 3 else f"prompt {row}" for row in range(20)]
    failing, late = frozenset({1, 2, 11}), frozenset({4, 15})
    job = make_job(tmp_path, prompts, run={"max_error_rate": 0.5, "row_timeout_s": 7.5})
    job.run(Script(failing=failing, late=late))
    assert_accounted(job, {3, *failing, *late}, 20)
    messages = {row["message"] for row in job.errors() if row["error_class"] == "RowTimeoutError"}
    assert messages == {"over 7.5 s"}, "the engine was not told how long a row may take"

    job.run(Script(failing=frozenset({2})), retry=["NonFiniteScoresError"])
    assert_accounted(job, {2, 3, *late}, 20)
    attempts = {row["row_id"]: row["attempts"] for row in job.errors()}
    assert attempts == {2: 2, 3: 1, 4: 1, 15: 1}, "only the rows of that class are tried again"
    (started,) = job.events("retry_started")
    assert started["rows"] == 3 and started["chunks"] == 2
    last = job.progress[-1]
    assert last.rows_done == last.rows_total == 3, "progress is of the retried rows"
    assert last.chunks_committed == last.chunks_total == 2

    result = job.run(Script(), retry=[])
    assert_accounted(job, {3}, 20)
    (error,) = job.errors()
    assert (error["error_class"], error["attempts"]) == ("EmptyPromptError", 2)
    assert result.totals.rows_error == result.success["rows"]["error"] == 1
    names = {path.name for path in (job.out / "errors").iterdir()}
    assert names == {"part-00000.r2.parquet"}, "superseded error rows are still there"
    job.run(Script(), retry=["NonFiniteScoresError"])
    assert_accounted(job, {3}, 20)


def test_a_job_over_its_limit_drains_and_goes_on_with_a_higher_one(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    failing = frozenset(range(0, 200, 10))
    job = make_job(tmp_path, prompts=200, run={"max_error_rate": 1.0, "max_errors": 3})
    with pytest.raises(TooManyErrorsError, match=r"run\.max_errors allows 3") as caught:
        job.run(Script(failing=failing, step_s=0.005))
    assert caught.value.exit_code == 3
    leased = {event["chunk_id"] for event in job.events("chunk_leased")}
    committed = {event["chunk_id"] for event in job.events("chunk_committed")}
    assert leased == committed, "what was under way when it stopped is not finished"
    assert len(committed) < 40, "it went on to its end although it was lost"
    with pytest.raises(TooManyErrorsError):
        job.run(Script(failing=failing))
    assert len(job.events("chunk_leased")) == len(leased), "it went on with the same limit"

    before = {event["chunk_id"] for event in job.events("chunk_committed")}
    job.run(Script(), retry=[], max_errors=None)
    assert not job.errors() and not (job.out / "_SUCCESS").exists(), "the job is not done yet"
    result = job.run(Script(failing=failing), max_errors=None)
    assert result.chunks_before == len(before)
    assert_accounted(job, {r for r in failing if r // 5 not in before}, 200)


def test_a_job_that_is_complete_but_over_its_limit_is_not_called_done(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    job = make_job(tmp_path, prompts=4, chunk_rows=4, run={"max_errors": 0})
    for _ in range(2):
        with pytest.raises(TooManyErrorsError):
            job.run(Script(failing=frozenset({1})), max_error_rate=1.0)
        assert not (job.out / "_SUCCESS").exists()
    job.run(Script(), retry=[])
    assert_accounted(job, set(), 4)
