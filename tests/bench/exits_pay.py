"""Does a job with fitted exits pay? The whole job with exits and without, in turns, in one process.

    python -m tests.bench.exits_pay --job jobs/extract.yaml --heads out/extract-exits \
        --set exit.kv=bridge --threshold 0.67 --rows 1000 --out FILE
"""

from __future__ import annotations

import argparse
import json
import time
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
from eevp_batch.storage.inputs import list_inputs
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--charge-to", type=int, default=20_000, help="rows that pay for the fit")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run both in turns and print what exits gained and cost."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    overrides = [f"exit.heads={Path(chosen.heads).resolve()}", "exit.mode=on", *chosen.overrides]
    thresholds = json.dumps(chosen.threshold)
    job = prepare(chosen.job, [*overrides, f"exit.threshold={thresholds}"])
    spec, tokenizer = job.spec, load_tokenizer(job.model, job.spec.model)
    encoder = PromptEncoder(tokenizer, spec.prompt, spec.input, job.max_prompt_tokens)
    manifest = read_manifest(Path(chosen.heads))
    rows = unseen(spec.input.path, encoder, manifest, chosen.rows)
    prompts = [Prompt(number, token_ids) for number, (_, token_ids) in enumerate(rows)]
    cut = cut_model(load_weights(spec.model, job.model), tokenizer, spec.exit)
    runs = FreeRuns(cut, tokenizer, spec.exit, spec.sampling, spec.engine)
    engines = {"off": runs.engine(None), "on": runs.engine(chosen.threshold)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    outputs: dict[str, dict[int, Generation]] = {}
    for turn in range(chosen.rounds):
        for name in sorted(engines, reverse=bool(turn % 2)):
            taken, outputs[name] = timed(engines[name], prompts)
            seconds[name].append(taken)
            print(f"{name}: {taken:.1f} s", flush=True)
    found = compared(outputs, seconds, [row.get("expected") for row, _ in rows])
    found |= charged(found, manifest, len(rows), chosen.charge_to)
    exit = spec.exit.model_dump(mode="json")
    found = {"setup": setup() | {"job": chosen.job, "exit": exit, "heads": None}, **found}
    found["setup"]["exit"]["heads"] = {"figures": manifest["figures"]}
    print(json.dumps({k: v for k, v in found.items() if k != "setup"}, indent=1))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


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
    expected: list[str | None],
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
        if all(answer is not None for answer in expected):
            right = [
                some[n].text.strip().startswith(str(answer).rstrip("}"))
                for n, answer in enumerate(expected)
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
