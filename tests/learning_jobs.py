"""Jobs that learn their exits: a model whose exits are known, and a job over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.plain_output import committed_parts, events, read_rows
from tests.real_jobs import write_job
from tests.tiny_models import build_model, build_tokenizer

NUM_ROWS, CHUNK_ROWS, LEARN_ROWS = 180, 10, 90
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "that", "sleeps")

STAGES: dict[str, Callable[[Path], Any]] = {
    "collecting": lambda out: len(committed_parts(out)) >= 2,
    "learning": lambda out: events(out, "learning_started"),
    "publishing": lambda out: list((out / "_eevp" / "learned").glob("*")),
    "exits": lambda out: events(out, "exits_learned"),
}
"""By name, when a job is in the middle of it; truth of what is returned."""


def save_shallow_model(folder: Path) -> Path:
    """A Llama of six layers whose last four change nothing: an exit after layer 2 is perfect."""
    model = build_model("llama")
    for layer in model.model.layers[2:]:
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def learning_job(
    folder: Path, model: Path, exits: dict[str, Any] | None = None, **fields: Any
) -> Path:
    """Its job file; `exits` and `fields` overwrite.

    The exit layer is named: which ones a search finds best depends on how long things take here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        f"{' '.join(WORDS[row % 7 : row % 7 + 1 + row % 5])} {row}" for row in range(NUM_ROWS)
    ]
    table = pa.table({"id": [f"q{row:03}" for row in range(NUM_ROWS)], "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    exit = {"mode": "learn", "layers": [2], "delta": 0.1, "epsilon": 0.2, "learn_rows": LEARN_ROWS}
    whole = {
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {**exit, "learn_gain": 0.0, **(exits or {})},
        "sampling": {"max_new_tokens": 12},
        "engine": {"max_resident": 8},
        "run": {"chunk_rows": CHUNK_ROWS},
        "audit": {"full_depth_fraction": 0.3},
    }
    return write_job(folder, whole | fields)


def assert_phases_are_told(out: Path, num_layers: int = 6) -> dict[str, int]:
    """Rows, commit records and leases agree on the phase of every chunk; rows by phase."""
    counts: dict[str, int] = {}
    records = {
        int(path.stem): json.loads(path.read_text())["attempt"]["phase"]
        for path in (out / "_eevp" / "commits").glob("*.json")
    }
    # Epochs begin anew with each run of the job; the last lease before the commit is the one.
    leased: dict[int, str] = {}
    for event in events(out):
        if event["event"] == "chunk_leased":
            leased[event["chunk_id"]] = event["phase"]
        elif event["event"] == "chunk_committed":
            assert leased[event["chunk_id"]] == records[event["chunk_id"]]
    for row in read_rows(out):
        assert row["phase"] == records[row["chunk_id"]]
        assert row["phase"] == "exits" or set(row["exit_layers"]) == {num_layers}
        counts[row["phase"]] = counts.get(row["phase"], 0) + 1
    return counts
