"""What an MLP in the exit heads is worth, and what it costs, beside affine heads; one run.

Heads of both kinds are fitted to the same rows, epochs chosen by the same held-out ones, and judged
on rows that neither has seen, the text of full depth before every token. What a head costs is timed
in turns, for the tokens that are decided at once.

    python -m tests.bench.head_kinds --job jobs/extract.yaml --layers 2,24 --rows 400 --out FILE
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.exit_heads import LaidOutHead
from eevp_batch.engine.fitted import ExitHead, MlpHead
from eevp_batch.engine.load import load_job_model
from eevp_batch.engine.segment_times import layer_time
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.prepare import prepare
from eevp_batch.tune.collect import Collected, collect
from eevp_batch.tune.fit import ridge_head, split_rows
from eevp_batch.tune.head_training import HeadSettings, fit_head
from eevp_batch.tune.heads import SCORED_ROWS, agreement, choices, share_leaving_of_all
from eevp_batch.tune.outputs import full_depth_engine, full_depth_rows
from eevp_batch.tune.states import Row
from tests.bench.machine import setup, write_json

TARGETS = (0.99, 0.98)
"""Shares of all tokens that stay as at full depth."""
ROUNDS = 500


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--from", dest="source", help="output at full depth; else rows are made")
    parser.add_argument("--layers", default="2,24")
    parser.add_argument("--rows", type=int, default=400, help="half of them fit, a quarter judge")
    parser.add_argument("--widths", default="144", help="of the MLPs")
    parser.add_argument("--epochs", default="2", help="settings of epochs that are tried")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Fit heads of both kinds after every layer, and print how they do."""
    chosen = options()
    layers = [int(layer) for layer in chosen.layers.split(",")]
    widths = [None, *(int(width) for width in chosen.widths.split(","))]
    model, rows = job_rows(chosen)
    rest, judged_rows = split_rows(rows, 0.25, seed=1)
    fitting, held_out = split_rows(rest, 1 / 3, seed=0)
    parts = [collect(model, some, layers, False) for some in (fitting, held_out, judged_rows)]
    facts = {
        "rows": [len(some) for some in (fitting, held_out, judged_rows)],
        "tokens": [len(part.owners) for part in parts],
    }
    found: list[dict[str, Any]] = []
    heads: dict[str, ExitHead] = {}
    for layer in layers:
        for epochs in map(int, chosen.epochs.split(",")):
            for width in widths:
                settings = HeadSettings(epochs=epochs, patience=epochs, mlp_width=width)
                head, figures = judged(model, parts, layer, settings)
                heads["mlp " + str(head.width) if isinstance(head, MlpHead) else "affine"] = head
                found.append({"layer": layer, "mlp_width": width, "epochs": epochs, **figures})
                print(found[-1], flush=True)
                write_json(chosen.out, {"setup": setup() | facts, "heads": found})
    costs = timed(model, heads)
    print(costs)
    write_json(chosen.out, {"setup": setup() | facts, "heads": found, "costs": costs})


def job_rows(chosen: argparse.Namespace) -> tuple[SegmentedModel, list[Row]]:
    """The job's model, and rows of it at full depth."""
    job = prepare(chosen.job, [*chosen.overrides, "exit.mode=off"])
    weights, tokenizer, encoder, _ = load_job_model(job.spec, job.model)
    model = SegmentedModel(weights, [job.model.num_layers])

    def engine() -> Engine:
        return full_depth_engine(weights, model, tokenizer, job.spec.sampling, job.spec.engine)

    draw = (chosen.source, chosen.rows, 0)
    rows = full_depth_rows(job.spec, job.plan.fields, encoder, engine, print, *draw)
    return model, rows


def judged(
    model: SegmentedModel, parts: Sequence[Collected], layer: int, settings: HeadSettings
) -> tuple[ExitHead, dict[str, Any]]:
    """A head, and what it does on the last part."""
    seen, held_out, unseen = parts
    start = ridge_head(model, seen.heads[layer], held_out.heads[layer])
    started = time.perf_counter()
    fit = fit_head(model, start, seen.taught[layer], held_out.taught[layer], settings)
    seconds = time.perf_counter() - started
    tokens = unseen.taught[layer]
    said = choices(model, fit.head, tokens.units)
    figures = {
        "agreement": agreement(said, tokens.best_ids),
        "leaving": {str(t): share_leaving_of_all(said, tokens, t) for t in TARGETS},
        "fit_s": round(seconds, 1),
        "loss": [round(point.get("loss", 0.0), 4) for point in fit.curve],
    }
    return fit.head, figures


@torch.inference_mode()
def timed(model: SegmentedModel, heads: Mapping[str, ExitHead]) -> dict[str, Any]:
    """Microseconds per token of each head, in turns, and of a layer; weights of each head."""
    laid_out = {n: LaidOutHead(head, model.dtype, model.device) for n, head in heads.items()}
    units = torch.randn(SCORED_ROWS, model.hidden_size).to(model.device, model.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in laid_out}
    for _ in range(ROUNDS):
        for name, head in laid_out.items():
            started = time.perf_counter()
            head(units)
            seconds[name].append(time.perf_counter() - started)
    scale = 1e6 / SCORED_ROWS
    costs: dict[str, Any] = {
        name: {
            "us": statistics.median(taken) * scale,
            "weights": model.hidden_size
            * (model.hidden_size + 2 * (laid_out[name].mlp_width or 0)),
        }
        for name, taken in seconds.items()
    }
    return costs | {"layer": {"us": layer_time(model, SCORED_ROWS) * scale}}


if __name__ == "__main__":
    main()
