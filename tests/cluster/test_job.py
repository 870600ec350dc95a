"""Whole jobs through real actors and real storage, with engines that misbehave as told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.cluster.deaths import MAX_DEATHS_IN_A_ROW
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.errors import JobFailedError, TooManyErrorsError
from eevp_batch.storage.store import Store
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script, exits_of
from tests.plain_output import leased_again

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(shared_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job of 60 rows that nothing happens to."""
    job = make_job(tmp_path_factory.mktemp("undisturbed"))
    job.run(Script())
    return job


def test_every_row_comes_out_once(undisturbed: Job) -> None:
    rows = undisturbed.rows()
    assert [row["row_id"] for row in rows] == list(range(60)), "each row stands in the output once"
    for row in rows:
        exits = exits_of(row["row_id"], 0)
        assert row["token_ids"] == [exit.token_id for exit in exits]
        assert row["exit_layers"] == [exit.exit_layer for exit in exits]
    assert not undisturbed.errors() and not undisturbed.problems()


def test_the_events_tell_the_whole_story(undisturbed: Job) -> None:
    assert len(undisturbed.events("job_started")) == 1
    assert len(undisturbed.events("replica_ready")) >= 1
    leased = [event["chunk_id"] for event in undisturbed.events("chunk_leased")]
    committed = [event["chunk_id"] for event in undisturbed.events("chunk_committed")]
    assert sorted(leased) == sorted(committed) == list(range(12)), "each chunk once, once"
    (finished,) = undisturbed.events("job_finished")
    assert finished["rows_ok"] == 60 and finished["rows_error"] == 0
    last = undisturbed.progress[-1]
    assert last.rows_done == last.rows_total == 60
    assert last.chunks_committed == last.chunks_total == 12 and last.chunks_leased == 0


def test_a_done_job_is_verified_again_and_nothing_runs(undisturbed: Job) -> None:
    before = undisturbed.parts()
    result = undisturbed.run(Script(raising=frozenset(range(60))))
    assert result.chunks_before == result.chunks == 12 and result.working_s == 0
    assert undisturbed.parts() == before, "a committed part was touched"


def test_a_killed_replica_changes_nothing_in_the_output(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path
) -> None:
    job = make_job(tmp_path)
    script = Script(killing=frozenset({31}), once=str(tmp_path / "killed"), step_s=0.002)
    result = job.run(script)
    assert result.recoveries.replica_deaths == 1, "the kill did not happen"
    assert result.recoveries.chunks_returned >= 1
    (dead,) = job.events("replica_dead")
    held = set(dead["chunks"])
    assert leased_again(job.out) == held, "exactly what the dead replica held goes again"
    assert job.rows() == undisturbed.rows()
    assert not job.problems()
    assert any("died" in message for message in job.messages), "the user was not told"


def test_several_samples_of_a_row(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts=20, n=3)
    result = job.run(Script(failing=frozenset({4}), max_resident=5), max_error_rate=1.0)
    rows = job.rows()
    assert [(r["row_id"], r["sample_index"]) for r in rows] == [
        (row, sample) for row in range(20) if row != 4 for sample in range(3)
    ]
    assert [r["token_ids"] for r in rows] == [
        [e.token_id for e in exits_of(r["row_id"], r["sample_index"])] for r in rows
    ]
    assert result.totals.rows_ok == 19 and result.totals.rows_error == 1


def test_bad_rows_become_error_rows(shared_ray: LocalRay, tmp_path: Path) -> None:
    prompts = [None if row == 3 else "" if row == 17 else f"prompt {row}" for row in range(40)]
    job = make_job(tmp_path, prompts)
    result = job.run(Script(failing=frozenset({8, 25, 26, 27, 28, 29})), max_error_rate=0.2)
    errors = {row["row_id"]: row["error_class"] for row in job.errors()}
    failed = dict.fromkeys((8, 25, 26, 27, 28, 29), "NonFiniteScoresError")
    assert errors == {3: "EmptyPromptError", 17: "EmptyPromptError", **failed}
    assert [row["row_id"] for row in job.rows()] == [r for r in range(40) if r not in errors]
    assert result.totals.rows_ok + result.totals.rows_error == 40
    assert not job.problems(), "a chunk of nothing but errors is accounted for too"


def test_a_prompt_that_is_not_utf8_becomes_an_error_row(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    prompts = pa.array([b"\xff\xfe" if row == 7 else b"prompt" for row in range(20)])
    broken = prompts.cast(pa.string(), safe=False)
    pq.write_table(pa.table({"id": range(20), "prompt": broken}), tmp_path / "prompts.parquet")
    job = make_job(tmp_path, prompts=20)
    job.run(Script(), max_error_rate=0.05)
    (error,) = job.errors()
    assert (error["row_id"], error["error_class"]) == (7, "UnreadableTextError"), (
        "the bad row fails"
    )
    assert "'prompt'" in error["message"], "the column is not named"
    assert [row["row_id"] for row in job.rows()] == [row for row in range(20) if row != 7], (
        "the rows beside the bad one come out"
    )
    assert not job.problems(), "the output accounts for every row"


def test_a_kept_text_that_is_not_utf8_becomes_an_error_row(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    """Carried over as it is, it would make the whole part unreadable."""
    notes = pa.array([b"\xff\xfe" if row in (2, 7) else b"fine" for row in range(20)])
    columns = {"id": range(20), "prompt": ["p"] * 20, "note": notes.cast(pa.string(), safe=False)}
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    job = make_job(tmp_path, prompts=20, keep=["note"])
    job.run(Script(), max_error_rate=0.1)
    errors = {row["row_id"]: row["error_class"] for row in job.errors()}
    assert errors == dict.fromkeys((2, 7), "UnreadableTextError"), "the bad rows fail"
    assert {row["note"] for row in job.rows()} == {"fine"}, "the rows beside them come out"
    assert not job.problems(), "the output accounts for every row"


def test_too_many_error_rows_end_the_job_once_that_is_certain(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    job = make_job(tmp_path, prompts=200, run={"max_error_rate": 0.05})
    script = Script(failing=frozenset(range(0, 200, 2)), step_s=0.005)
    with pytest.raises(TooManyErrorsError, match="NonFiniteScoresError"):
        job.run(script)
    assert len(job.parts()) < 80, "the job went on to its end although it was lost"
    assert not (job.out / "_SUCCESS").exists()
    (end,) = job.events("job_failed")
    assert end["chunks_committed"] == len(job.events("chunk_committed"))
    assert len(job.events("chunk_leased")) == end["chunks_committed"], "it did not drain"
    assert len(job.events("job_draining")) == 1
    resumed = job.run(script, max_error_rate=0.5)
    assert resumed.totals.rows_error == 100 and not job.problems()


def test_a_bug_in_a_replica_ends_the_job_and_is_not_retried(
    shared_ray: LocalRay, undisturbed: Job, tmp_path: Path
) -> None:
    job = make_job(tmp_path)
    with pytest.raises(JobFailedError, match="ZeroDivisionError: row 40 met a bug") as caught:
        job.run(Script(raising=frozenset({40})))
    assert "scripted.py" in str(caught.value), "the place of the bug is not told"
    assert all(event["attempt"] == 1 for event in job.events("chunk_leased")), "it was retried"
    assert not job.events("replica_dead")
    parts = job.parts()
    job.run(Script())
    assert job.rows() == undisturbed.rows(), "with the bug gone the job goes on to the same end"
    assert parts.items() <= job.parts().items(), "a committed part was touched"


def test_an_engine_that_refuses_to_load_ends_the_job_at_once(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    job = make_job(tmp_path, replicas=1)
    with pytest.raises(JobFailedError, match="this model will never load"):
        job.run(Script(unbuildable="error", counting=str(tmp_path)))
    assert len(list(tmp_path.glob("*-*"))) == 1, "an error of our own was tried again"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bug", "kill"])
def test_replicas_that_never_start_end_the_job_after_five(
    shared_ray: LocalRay, tmp_path: Path, how: str
) -> None:
    job = make_job(tmp_path, replicas=1)
    reason = "the disk is busy" if how == "bug" else "died"
    with pytest.raises(JobFailedError, match=reason):
        job.run(Script(unbuildable=how, counting=str(tmp_path)))
    assert len(list(tmp_path.glob("*-*"))) == MAX_DEATHS_IN_A_ROW


def test_the_last_chunks_spread_over_the_replicas(shared_ray: LocalRay, tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts=24, chunk_rows=3, replicas=2)
    job.run(Script(step_s=0.05, build_s=0.3))
    first = [event["replica"] for event in job.events("chunk_leased")][:4]
    assert len(job.events("chunk_leased")) == 8
    by_replica = {e["replica"] for e in job.events("chunk_committed")}
    assert len(by_replica) == 2, f"one replica did all the work; first leases: {first}"


def test_a_second_driver_is_refused(shared_ray: LocalRay, tmp_path: Path) -> None:
    from eevp_batch.errors import UsageError

    job = make_job(tmp_path)
    with (
        Store.open(str(job.out)).lock("_eevp/lock"),
        pytest.raises(UsageError, match="another process"),
    ):
        replace(job).run(Script())
