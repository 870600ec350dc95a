from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import JobFailedError, UsageError
from eevp_batch.report.figures import gather
from eevp_batch.report.summary import read_samples, summarise
from eevp_batch.report.text import render_status, render_summary
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, attempt_chunk, is_failing, make_spec, run_job, write_input
from tests.storage.retrying import redone_but, retry

IDS = [f"row-{number}" for number in range(30)]


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(write_input(tmp_path / "in.parquet", list(IDS)), num_samples=2)


@pytest.fixture
def done(tmp_path: Path, spec: JobSpec) -> Store:
    store = Store.open(tmp_path / "out")
    run_job(store, spec)
    return store


def test_a_summary_counts_what_the_parts_hold(done: Store) -> None:
    summary = summarise(done)
    table = pq.read_table(Path(done.text) / "data")
    failed = sum(is_failing(row_id) for row_id in IDS)
    totals = summary.totals
    assert summary.state == "done"
    assert (summary.rows_in, totals.rows_error) == (30, failed)
    assert totals.rows_ok + totals.rows_error == summary.rows_in, "every row is ok or in error"
    assert totals.generations == table.num_rows == 2 * totals.rows_ok
    layers = [layer for row in table.column("exit_layers").to_pylist() for layer in row]
    assert totals.generated_tokens == len(layers)
    assert totals.exit_histogram == {e: layers.count(e) for e in summary.exit_layers}
    mean = sum(layers) / len(layers)
    assert summary.layers_skipped_fraction == pytest.approx(1 - mean / 6)


def test_samples_are_rows_of_the_output_with_their_prompts(done: Store) -> None:
    rows = pq.read_table(Path(done.text) / "data").to_pylist()
    texts = {(row["row_id"], row["sample_index"]): row["text"] for row in rows}
    samples = summarise(done).samples
    assert len({sample.row_id for sample in samples}) == 3, "three different rows are shown"
    for sample in samples:
        assert sample.text == texts[sample.row_id, sample.sample_index]
        assert sample.prompt == f"prompt of {sample.row_id}"


def test_rows_that_were_tried_again_are_read_as_the_others(done: Store, spec: JobSpec) -> None:
    failing = [row_id for row_id in IDS if is_failing(row_id)]
    hopeless = failing[:2]
    retry(done, spec, redone_but(hopeless, num_samples=2))
    figures = gather(done)
    assert figures.sample.rows == figures.summary.totals.generations == 2 * (len(IDS) - 2)
    in_error = [row["row_id"] for rows in figures.errors.values() for row in rows]
    assert sorted(in_error) == sorted(hopeless)
    tokens = sum(counts.total() for counts in figures.chunks.tokens.values())
    assert tokens == figures.summary.totals.generated_tokens
    shown = read_samples(done, figures.plan, 1000)
    assert any(sample.row_id in failing for sample in shown), "a patch is shown like any part"
    assert all(sample.prompt == f"prompt of {sample.row_id}" for sample in shown)


def test_samples_do_without_the_input(done: Store, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").unlink()
    samples = summarise(done).samples
    assert len(samples) == 3 and all(sample.prompt is None for sample in samples)


def test_a_small_job_shows_each_generation_once(tmp_path: Path) -> None:
    ids = [row_id for row_id in IDS if not is_failing(row_id)][:2]
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(write_input(tmp_path / "in.parquet", list(ids))))
    assert [sample.row_id for sample in summarise(store).samples] == ids


def test_a_job_whose_rows_all_failed_is_summed_up(tmp_path: Path) -> None:
    ids = [row_id for row_id in IDS if is_failing(row_id)]
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(write_input(tmp_path / "in.parquet", list(ids))))
    summary = summarise(store)
    assert summary.samples == [] and summary.layers_skipped_fraction is None
    text = render_summary(summary, 80)
    assert f"0 ok, {len(ids)} in error (100.0 %)" in text
    assert f"EmptyPromptError {len(ids)}" in text


def test_a_job_under_way_is_summed_up(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    plan = open_plan(store, make_plan(spec, MODEL), "version: 1\n")
    before = summarise(store)
    assert (before.state, before.chunks_done, before.samples) == ("planned", 0, [])
    assert "planned" in render_summary(before, 80)
    Committer(store, plan).commit(attempt_chunk(store, plan, spec, plan.chunks[0]), 1)
    summary = summarise(store)
    assert (summary.state, summary.chunks_done) == ("interrupted", 1)
    assert f"chunks          1 of {len(plan.chunks)}" in render_summary(summary, 80)
    assert not any(path.endswith("_SUCCESS") for path in summary.written)


def test_a_summary_is_json_and_fits_the_terminal(done: Store) -> None:
    summary = summarise(done)
    data = json.loads(json.dumps(summary.to_json()))
    assert data["totals"]["rows_ok"] == summary.totals.rows_ok
    assert data["mean_exit_layer"] == summary.totals.mean_exit_layer
    for width in (40, 80, 120):
        text = render_summary(summary, width)
        assert "\x1b" not in text, "no colour codes"
        for line in text.split("written\n")[0].splitlines():
            assert len(line) <= max(width, 62), f"{line!r} is wider than {width}"


def test_a_summary_names_what_was_written(done: Store) -> None:
    names = [Path(path).relative_to(done.text).as_posix() for path in summarise(done).written]
    assert names == ["data", "errors", "_SUCCESS", "_eevp/job.resolved.yaml", "_eevp/plan.json"]


def test_a_damaged_part_is_named(done: Store) -> None:
    name = done.list("data")[0]
    Path(done.text, "data", name).write_bytes(b"PAR1")
    with pytest.raises(JobFailedError, match=name):
        summarise(done)


def test_an_errors_part_that_is_gone_is_named(done: Store) -> None:
    name = done.list("errors")[0]
    done.delete(f"errors/{name}")
    with pytest.raises(JobFailedError, match=rf"{name}: .*not there.*eevp-batch verify"):
        gather(done)


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no job"):
        summarise(Store.open(tmp_path))


def test_a_status_is_drawn(done: Store) -> None:
    text = render_status(read_status(done), 80, now_unix_s=0.0)
    assert "done" in text.splitlines()[0] and "100.0 %" in text.splitlines()[1]
