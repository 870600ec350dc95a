"""Does a job with fitted exits pay? The whole job with exits and without, in turns.

Several processes share the rows, as the replicas of a job do, each with cores of its own. Any
number of settings take turns with exits off, so that all can be compared in one run:

    python -m tests.bench.exits_pay --job jobs/extract.yaml --heads out/extract-exits \
        --set exit.kv=bridge --point "0.67: exit.threshold=0.67" --rows 1000 --out FILE
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import torch

from eevp_batch.cluster.audit import compare
from eevp_batch.engine.cut import CutModel, cut_model
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import load_weights
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.fitted_config import has_adapter, read_manifest
from eevp_batch.prepare import prepare
from eevp_batch.records import AuditCounts, Generation, Prompt
from eevp_batch.spec import ExitSpec
from eevp_batch.storage.listing import list_inputs
from eevp_batch.tune.audited import audit_figures
from eevp_batch.tune.states import prompt_key
from tests.bench.machine import setup, write_json
from tests.bench.workloads_answers import ANSWERS

OFF = "off"


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--heads", required=True, help="folder that fit wrote")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument(
        "--point",
        dest="points",
        action="append",
        required=True,
        metavar="NAME: FIELD=VALUE ...",
        help="exits to measure, as changes of the job; may be given again",
    )
    parser.add_argument("--rows", type=int, default=1000, help="that the exits were not fitted to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="that share rows and cores")
    parser.add_argument("--charge-to", type=int, default=20_000, help="rows that pay for the fit")
    parser.add_argument("--answer", choices=sorted(ANSWERS), default="start", help="when right")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class Trial:
    """What is measured.

    Attributes:
        job: job file.
        overrides: what it does not say, for all points.
        points: by name, further overrides of each; `off` is measured beside them.
        rows: how many, none of which the exits were fitted to.
        rounds: how often all take their turn.
        processes: that share rows and cores.
    """

    job: str
    overrides: Sequence[str]
    points: dict[str, Sequence[str]]
    rows: int
    rounds: int
    processes: int


@dataclass
class Measured:
    """What was found, by one process or by all.

    Attributes:
        seconds: by setting, one for each round.
        outputs: by setting, generations by row number.
        prompts: token ids by row number.
        expected: by row number, the right answer where the input has one.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    outputs: dict[str, dict[int, Generation]] = field(default_factory=dict)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    expected: dict[int, str | None] = field(default_factory=dict)


def main() -> None:
    """Run all in turns and print what exits gained and cost."""
    chosen = options()
    heads = [f"exit.heads={Path(chosen.heads).resolve()}", "exit.mode=on"]
    trial = Trial(
        chosen.job,
        [*heads, *chosen.overrides],
        dict(map(parsed_point, chosen.points)),
        chosen.rows,
        chosen.rounds,
        chosen.processes,
    )
    manifest = read_manifest(Path(chosen.heads))
    fit_s = manifest["data"]["states_s"] + manifest["figures"]["fit_s"]
    fitted_rows = manifest["data"]["rows"] + manifest["data"]["held_out_rows"]
    found = figures(measure(trial), chosen.answer)
    for point in found["points"].values():
        point |= charged(found[OFF], point, fit_s, fitted_rows, chosen.charge_to)
    facts = {"job": chosen.job, "points": trial.points, "heads": {"figures": manifest["figures"]}}
    print(json.dumps(found, indent=1))
    write_json(chosen.out, {"setup": setup() | facts, **found})


def parsed_point(text: str) -> tuple[str, list[str]]:
    """A name and the overrides after its colon."""
    name, colon, overrides = text.partition(":")
    if not colon or not overrides.split():
        raise SystemExit(f"--point: found {text!r}; allowed: NAME: FIELD=VALUE ...")
    return name.strip(), overrides.split()


def measure(trial: Trial) -> Measured:
    """Run exits off and all points in turns; the processes begin each turn together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(trial.processes)
    with ProcessPoolExecutor(trial.processes, context, _meet_at, (barrier,)) as pool:
        parts = list(pool.map(_measure_part, [trial] * trial.processes, range(trial.processes)))
    whole = Measured()
    for name in (OFF, *trial.points):
        # All begin together, and the last one to end ends it.
        turns = zip(*(part.seconds[name] for part in parts), strict=True)
        whole.seconds[name] = [max(turn) for turn in turns]
        whole.outputs[name] = {n: g for part in parts for n, g in part.outputs[name].items()}
    for part in parts:
        whole.prompts |= part.prompts
        whole.expected |= part.expected
    return whole


_barrier: Barrier


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _measure_part(trial: Trial, part: int) -> Measured:
    """Time every setting on every so-and-so-many-th row, beside the other processes."""
    cores = sorted(os.sched_getaffinity(0))[part :: trial.processes]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    job = prepare(trial.job, trial.overrides)
    spec, tokenizer = job.spec, load_tokenizer(job.model, job.spec.model)
    encoder = PromptEncoder(tokenizer, spec.prompt, spec.input, job.max_prompt_tokens)
    rows = unseen(spec.input.path, encoder, spec.exit.heads, trial.rows)
    mine = dict(list(enumerate(rows))[part :: trial.processes])
    found = Measured(
        prompts={number: token_ids for number, (_, token_ids) in mine.items()},
        expected={number: row.get("expected") for number, (row, _) in mine.items()},
    )
    prompts = [Prompt(number, token_ids) for number, token_ids in found.prompts.items()]
    exits = {name: _exit_of(trial, overrides) for name, overrides in trial.points.items()}
    cuts = _cuts(lambda: load_weights(spec.model, job.model), tokenizer, exits)
    for turn in range(trial.rounds):
        for name in sorted(cuts, reverse=bool(turn % 2)):
            exit, cut = exits.get(name, ExitSpec(mode=OFF)), cuts[name]
            engine = cut.engine(tokenizer, exit, spec.sampling, spec.engine)
            _barrier.wait()
            taken, found.outputs[name] = timed(engine, prompts)
            found.seconds.setdefault(name, []).append(taken)
            print(f"{name}: {taken:.1f} s", flush=True)
    return found


def _exit_of(trial: Trial, overrides: Sequence[str]) -> ExitSpec:
    return prepare(trial.job, [*trial.overrides, *overrides]).spec.exit


def _cuts(
    load: Callable[[], Any], tokenizer: Any, exits: dict[str, ExitSpec]
) -> dict[str, CutModel]:
    """The model as each setting has it; its layers are there once, and once for each adapter."""
    weights = load()
    off = cut_model(weights, tokenizer, ExitSpec(mode=OFF))
    cuts = {
        name: cut_model(load(), tokenizer, exit)
        if has_adapter(exit)
        else cut_model(weights, tokenizer, exit, cut=off.model)
        for name, exit in exits.items()
    }
    return {OFF: off, **cuts}


def unseen(
    path: Any, encoder: PromptEncoder, heads: str | None, count: int
) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows that nothing was fitted to, with their token ids."""
    fitted: set[str] = set()
    if heads is not None:
        fitted = set(str(read_manifest(Path(heads))["data"].get("prompt_keys", "")).split())
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


def figures(measured: Measured, answer: str) -> dict[str, Any]:
    """Rates of all, and of each point how much the output changed.

    Args:
        measured: by all processes.
        answer: when a text is right, see `ANSWERS`.
    """
    off = _rates(measured, OFF, answer)
    points = {}
    for name in measured.outputs:
        if name != OFF:
            point = _rates(measured, name, answer) | _changes(measured, name)
            pairs = zip(measured.seconds[OFF], measured.seconds[name], strict=True)
            point["speed_by_round"] = [a / b for a, b in pairs]
            point["speed"] = mean(measured.seconds[OFF]) / mean(measured.seconds[name])
            points[name] = point
    return {"rows": len(measured.prompts), OFF: off, "points": points}


def _rates(measured: Measured, name: str, answer: str) -> dict[str, Any]:
    outputs, seconds = measured.outputs[name], measured.seconds[name]
    tokens = sum(one.generated_tokens for one in outputs.values())
    found: dict[str, Any] = {
        "tokens_per_s": [tokens / taken for taken in seconds],
        "rows_per_s": [len(outputs) / taken for taken in seconds],
    }
    known = {n: a for n, a in measured.expected.items() if a is not None}
    if known:
        is_right = ANSWERS[answer]
        found["right_answers"] = mean(is_right(outputs[n].text, a) for n, a in known.items())
    return found


def _changes(measured: Measured, name: str) -> dict[str, Any]:
    """How a point's outputs differ from full depth, with 95 % intervals, as an audit counts."""
    off, on = measured.outputs[OFF], measured.outputs[name]
    layers = [exit.exit_layer for one in on.values() for exit in one.exits]
    audited = AuditCounts.of([replace(on[n], audit=compare(on[n], off[n])) for n in off])
    changed = audit_figures(audited)
    assert changed is not None, "there are rows"
    return {
        "mean_exit_layer": mean(layers),
        "leaving": mean(layer < on[0].num_layers for layer in layers),
        "identical_rows": 1 - changed.diverged / changed.rows,
        "edit_distance": changed.distance,
        "edit_distance_interval": changed.distance_interval,
        "disagreement": changed.disagreement,
        "disagreement_interval": changed.disagreement_interval,
    }


def charged(
    off: dict[str, Any], point: dict[str, Any], fit_s: float, fitted_rows: int, charge_to: int
) -> dict[str, Any]:
    """The speed of a larger job that pays for the fit, its first rows at full depth."""
    off_s, on_s = (1 / mean(found["rows_per_s"]) for found in (off, point))
    with_fit = fitted_rows * off_s + fit_s + (charge_to - fitted_rows) * on_s
    return {"fit_s": fit_s, "charged_to_rows": charge_to, "charged": charge_to * off_s / with_fit}


if __name__ == "__main__":
    main()
