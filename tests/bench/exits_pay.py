"""Does a job with fitted exits pay? The whole job with exits and without, in turns.

Several processes share the rows, as the replicas of a job do, each with cores of its own.

    python -m tests.bench.exits_pay --job jobs/extract.yaml --heads out/extract-exits \
        --set exit.kv=bridge --threshold 0.67 --rows 1000 --out FILE
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import torch

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import cut_model, load_weights
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.fitted_config import read_manifest
from eevp_batch.prepare import prepare
from eevp_batch.records import Generation, Prompt
from eevp_batch.storage.listing import list_inputs
from eevp_batch.tune.free_run import FreeRuns
from eevp_batch.tune.states import prompt_key
from eevp_batch.tune.text_distance import edit_loss
from tests.bench.machine import setup


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--heads", required=True, help="folder that fit wrote")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--threshold", type=float, action="append", required=True)
    parser.add_argument("--rows", type=int, default=1000, help="that the exits were not fitted to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="that share rows and cores")
    parser.add_argument("--charge-to", type=int, default=20_000, help="rows that pay for the fit")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Attributes:
        seconds: by system, one for each round.
        outputs: by system, generations by row.
        expected: by row, the right answer where the input has one.
    """

    seconds: dict[str, list[float]]
    outputs: dict[str, dict[int, Generation]]
    expected: dict[int, str | None]


def main() -> None:
    """Run both in turns and print what exits gained and cost."""
    chosen = options()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(chosen.processes)
    with ProcessPoolExecutor(chosen.processes, context, _meet_at, (barrier,)) as pool:
        parts = list(pool.map(measure, [chosen] * chosen.processes, range(chosen.processes)))
    # All begin together, and the last one to end ends it.
    seconds = {
        name: [max(turn) for turn in zip(*(part.seconds[name] for part in parts), strict=True)]
        for name in ("off", "on")
    }
    outputs: dict[str, dict[int, Generation]] = {"off": {}, "on": {}}
    expected: dict[int, str | None] = {}
    for part in parts:
        expected |= part.expected
        for name, some in part.outputs.items():
            outputs[name] |= some
    manifest = read_manifest(Path(chosen.heads))
    found = compared(outputs, seconds, expected)
    found |= charged(found, manifest, len(expected), chosen.charge_to)
    exit = prepare(chosen.job, overrides(chosen)).spec.exit.model_dump(mode="json")
    facts = {"job": chosen.job, "exit": exit | {"heads": {"figures": manifest["figures"]}}}
    print(json.dumps(found, indent=1))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"setup": setup() | facts, **found}, indent=1) + "\n")


_barrier: Barrier


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def overrides(chosen: argparse.Namespace) -> list[str]:
    """What the job file does not say."""
    return [
        f"exit.heads={Path(chosen.heads).resolve()}",
        "exit.mode=on",
        f"exit.threshold={json.dumps(chosen.threshold)}",
        *chosen.overrides,
    ]


def measure(chosen: argparse.Namespace, part: int) -> Measured:
    """Time both systems on every so-and-so-many-th row, beside the other processes."""
    cores = sorted(os.sched_getaffinity(0))[part :: chosen.processes]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    job = prepare(chosen.job, overrides(chosen))
    spec, tokenizer = job.spec, load_tokenizer(job.model, job.spec.model)
    encoder = PromptEncoder(tokenizer, spec.prompt, spec.input, job.max_prompt_tokens)
    rows = unseen(spec.input.path, encoder, read_manifest(Path(chosen.heads)), chosen.rows)
    mine = dict(list(enumerate(rows))[part :: chosen.processes])
    prompts = [Prompt(number, token_ids) for number, (_, token_ids) in mine.items()]
    cut = cut_model(load_weights(spec.model, job.model), tokenizer, spec.exit)
    runs = FreeRuns(cut, tokenizer, spec.exit, spec.sampling, spec.engine)
    engines = {"off": runs.engine(None), "on": runs.engine(chosen.threshold)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    outputs: dict[str, dict[int, Generation]] = {}
    for turn in range(chosen.rounds):
        for name in sorted(engines, reverse=bool(turn % 2)):
            _barrier.wait()
            taken, outputs[name] = timed(engines[name], prompts)
            seconds[name].append(taken)
            print(f"{name}: {taken:.1f} s", flush=True)
    return Measured(seconds, outputs, {n: row.get("expected") for n, (row, _) in mine.items()})


def unseen(
    path: Any, encoder: PromptEncoder, manifest: dict[str, Any], count: int
) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows that nothing was fitted to, with their token ids."""
    fitted = set(str(manifest["data"].get("prompt_keys", "")).split())
    found = []
    for file in list_inputs(path):
        for row in pq.read_table(file).to_pylist():
            token_ids = encoder.encode(row)
            if prompt_key(token_ids) not in fitted:
                found.append((row, token_ids))
            if len(found) == count:
                return found
    return found


def timed(engine: Engine, prompts: list[Prompt]) -> tuple[float, dict[int, Generation]]:
    """Seconds of all prompts, and their generations."""
    started = time.perf_counter()
    found = {}
    for one in engine.generate(prompts):
        if not isinstance(one, Generation):
            raise SystemExit(f"row {one.row_id}: {one.message}")
        found[int(one.row_id)] = one
    return time.perf_counter() - started, found


def compared(
    outputs: dict[str, dict[int, Generation]],
    seconds: dict[str, list[float]],
    expected: dict[int, str | None],
) -> dict[str, Any]:
    """Rates, how much the output changed, and how often it is the expected answer."""
    off, on = outputs["off"], outputs["on"]
    layers = [exit.exit_layer for one in on.values() for exit in one.exits]
    found: dict[str, Any] = {
        "rows": len(off),
        "speed": mean(seconds["off"]) / mean(seconds["on"]),
        "speed_by_round": [a / b for a, b in zip(seconds["off"], seconds["on"], strict=True)],
        "mean_exit_layer": mean(layers),
        "leaving": mean(layer < on[0].num_layers for layer in layers),
        "identical_rows": mean(on[n].token_ids == off[n].token_ids for n in off),
        "edit_distance": mean(edit_loss(on[n].token_ids, off[n].token_ids) for n in off),
    }
    for name, some in outputs.items():
        tokens = sum(one.generated_tokens for one in some.values())
        found[f"{name}_tokens_per_s"] = [tokens / taken for taken in seconds[name]]
        found[f"{name}_rows_per_s"] = [len(some) / taken for taken in seconds[name]]
        if all(answer is not None for answer in expected.values()):
            right = [
                some[n].text.strip().startswith(str(answer).rstrip("}"))
                for n, answer in expected.items()
            ]
            found[f"{name}_right_answers"] = mean(right)
    return found


def charged(
    found: dict[str, Any], manifest: dict[str, Any], num_rows: int, charge_to: int
) -> dict[str, Any]:
    """The speed of a larger job that pays for the fit, its first rows at full depth."""
    fit_s = manifest["data"]["states_s"] + manifest["figures"]["fit_s"]
    off_s, on_s = (1 / mean(found[f"{name}_rows_per_s"]) for name in ("off", "on"))
    fitted = manifest["data"]["rows"] + manifest["data"]["held_out_rows"]
    with_fit = fitted * off_s + fit_s + (charge_to - fitted) * on_s
    return {"fit_s": fit_s, "charged_to_rows": charge_to, "charged": charge_to * off_s / with_fit}


if __name__ == "__main__":
    main()
