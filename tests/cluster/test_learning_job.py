"""Whole jobs that learn their exits: a model whose exits are known, and a hopeless one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.report.summary import summarise
from eevp_batch.report.text import render_summary
from eevp_batch.storage.store import Store
from tests.plain_output import events, read_rows
from tests.real_jobs import run_in_process, write_job
from tests.tiny_models import build_model, build_tokenizer

pytestmark = pytest.mark.ray

NUM_ROWS, CHUNK_ROWS, LEARN_ROWS = 180, 10, 90
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "that", "sleeps")


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers whose last four change nothing: an exit after layer 2 is perfect."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    model = build_model("llama")
    for layer in model.model.layers[2:]:
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def learning_job(folder: Path, model: Path, exits: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        f"{' '.join(WORDS[row % 7 : row % 7 + 1 + row % 5])} {row}" for row in range(NUM_ROWS)
    ]
    table = pa.table({"id": [f"q{row:03}" for row in range(NUM_ROWS)], "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    exit = {"mode": "learn", "delta": 0.1, "epsilon": 0.2, "learn_rows": LEARN_ROWS}
    fields = {
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {**exit, "learn_gain": 0.0, **(exits or {})},
        "sampling": {"max_new_tokens": 12},
        "engine": {"max_resident": 8},
        "run": {"chunk_rows": CHUNK_ROWS},
        "audit": {"full_depth_fraction": 0.3},
    }
    return write_job(folder, fields)


def assert_phases_are_told(out: Path) -> dict[str, int]:
    """Rows, commit records and leases agree on the phase of every chunk; rows by phase."""
    counts: dict[str, int] = {}
    records = {
        int(path.stem): json.loads(path.read_text())["attempt"]["phase"]
        for path in (out / "_eevp" / "commits").glob("*.json")
    }
    leased = {(e["chunk_id"], e["epoch"]): e["phase"] for e in events(out, "chunk_leased")}
    for event in events(out, "chunk_committed"):
        assert leased[event["chunk_id"], event["epoch"]] == records[event["chunk_id"]]
    for row in read_rows(out):
        assert row["phase"] == records[row["chunk_id"]]
        assert row["phase"] == "exits" or set(row["exit_layers"]) == {6}
        counts[row["phase"]] = counts.get(row["phase"], 0) + 1
    return counts


def test_perfect_exits_are_learned_and_taken(
    shared_ray: LocalRay, shallow_model: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, shallow_model))
    out = tmp_path / "out"
    counts = assert_phases_are_told(out)
    assert counts["exits"] >= CHUNK_ROWS and counts["full"] >= LEARN_ROWS
    (learned,) = events(out, "exits_learned")
    assert learned["layers"][0] == 2, "no earlier layer would do, no later one need be"
    assert learned["rows"] == LEARN_ROWS
    rows = [row for row in read_rows(out) if row["phase"] == "exits"]
    layers = [layer for row in rows for layer in row["exit_layers"]]
    assert sum(layer == 2 for layer in layers) > 0.9 * len(layers), "nearly every token leaves"
    summary = summarise(Store.open(out))
    assert summary.audit is not None and summary.audit.diverged == 0, "and rightly so"
    assert summary.exit_layers[0] == 2 and summary.num_layers == 6
    assert "exits learned after layer 2" in render_summary(summary, 100)


def test_a_model_without_good_exits_is_left_alone(
    shared_ray: LocalRay, tiny_llama: Path, tmp_path: Path
) -> None:
    run_in_process(learning_job(tmp_path, tiny_llama, {"layers": [2]}))
    assert assert_phases_are_told(tmp_path / "out") == {"full": NUM_ROWS}
    (failed,) = events(tmp_path / "out", "learning_failed")
    assert "nothing was certified" in failed["reason"] or "times the speed" in failed["reason"]
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
