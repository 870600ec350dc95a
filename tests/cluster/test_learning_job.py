"""Whole jobs that learn their exits: a model whose exits are known, and a hopeless one."""

from __future__ import annotations

from pathlib import Path

import pytest

from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.report.summary import summarise
from eevp_batch.report.text import render_summary
from eevp_batch.storage.learned import read_learned
from eevp_batch.storage.store import Store
from tests.learning_jobs import (
    CHUNK_ROWS,
    LEARN_ROWS,
    NUM_ROWS,
    assert_phases_are_told,
    learning_job,
    save_shallow_model,
)
from tests.plain_output import events, read_rows
from tests.real_jobs import run_in_process

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shallow_model(tmp_path_factory.mktemp("models") / "shallow")


def test_perfect_exits_are_learned_and_taken(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, shallow_model))
    out = tmp_path / "out"
    counts = assert_phases_are_told(out)
    assert counts["exits"] >= CHUNK_ROWS and counts["full"] >= LEARN_ROWS
    (learned,) = events(out, "exits_learned")
    told = [event["event"] for event in events(out)]
    committed = told[: told.index("learning_started")].count("chunk_committed")
    assert committed <= LEARN_ROWS // CHUNK_ROWS + 2, "it learns as soon as it can"
    assert learned["layers"] == [2]
    assert learned["rows"] == LEARN_ROWS
    rows = [row for row in read_rows(out) if row["phase"] == "exits"]
    layers = [layer for row in rows for layer in row["exit_layers"]]
    assert sum(layer == 2 for layer in layers) > 0.9 * len(layers), "nearly every token leaves"
    summary = summarise(Store.open(out))
    assert summary.audit is not None and summary.audit.diverged == 0, "and rightly so"
    assert summary.exit_layers[0] == 2 and summary.num_layers == 6
    assert "exits learned after layer 2" in render_summary(summary, 100)


def test_no_exit_is_searched_out_behind_the_first_that_is_perfect(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    """Whether an earlier one is worth its mistakes depends on how long things take here."""
    run_in_process(learning_job(tmp_path, shallow_model, {"layers": "auto"}))
    learned = read_learned(Store.open(tmp_path / "out"))
    assert learned is not None
    assert set(learned.figures["search"]["layers"]) in ({1}, {2}, {1, 2})
    assert_phases_are_told(tmp_path / "out")


def test_a_model_without_good_exits_is_left_alone(
    shared_ray: LocalRay, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its prompts, bridged, change a third of the tokens: none of its exits can be certified.

    Whether exits that can be are fast enough depends on how long things take here.
    """
    exits = {"layers": [2], "kv": "bridge", "prefill": "bridge"}
    run_in_process(learning_job(tmp_path, tiny_llama, exits))
    assert assert_phases_are_told(tmp_path / "out") == {"full": NUM_ROWS}
    (failed,) = events(tmp_path / "out", "learning_failed")
    assert "nothing was certified" in failed["reason"]
    assert "no number of rows would certify it" in failed["reason"]
    summary = summarise(Store.open(tmp_path / "out"))
    assert "the job goes on at full depth" in render_summary(summary, 100)


def test_too_few_rows_for_the_certificate_leave_a_job_at_full_depth(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, shallow_model, {"layers": [2], "delta": 0.01}))
    assert assert_phases_are_told(tmp_path / "out") == {"full": NUM_ROWS}
    (failed,) = events(tmp_path / "out", "learning_failed")
    assert "54 calibration rows cannot show a risk of at most 0.01" in failed["reason"]


def test_exits_that_save_less_than_they_cost_are_not_taken(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, shallow_model, {"learn_gain": 1e6, "layers": [2]}))
    assert assert_phases_are_told(tmp_path / "out") == {"full": NUM_ROWS}
    (failed,) = events(tmp_path / "out", "learning_failed")
    assert "exit.learn_gain" in failed["reason"]


def test_a_job_that_is_too_small_says_so_and_runs(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, shallow_model, {"learn_rows": "auto"}))
    assert assert_phases_are_told(tmp_path / "out") == {"full": NUM_ROWS}
    (failed,) = events(tmp_path / "out", "learning_failed")
    assert "exit.delta 0.1" in failed["reason"] and not events(tmp_path / "out", "learning_started")
