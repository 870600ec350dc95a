"""The steps of a workload. Each leaves a JSON file in the workload's folder, and is done once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.load import load_job_model
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.fitted_config import job_binding
from eevp_batch.prepare import prepare
from eevp_batch.report.summary import summarise
from eevp_batch.storage.store import Store
from eevp_batch.tune.bounds import Losses, least_rows, p_value, rows_needed_by_betting
from eevp_batch.tune.calibrate import TokenRisk, calibrate
from eevp_batch.tune.calibrate_job import TUNING_SHARE, job_costs, replay_settings
from eevp_batch.tune.calibration_result import CalibrationResult
from eevp_batch.tune.certify import certify as certified_place
from eevp_batch.tune.costs import for_job, measured_costs
from eevp_batch.tune.fit import split_rows
from eevp_batch.tune.potential import measure_potential
from eevp_batch.tune.replay import Replay, Thresholds
from eevp_batch.tune.states import Row
from eevp_batch.tune.survey import quick_heads
from tests.bench.exits_pay import OFF, Trial, charged, figures, measure
from tests.bench.machine import write_json
from tests.bench.quality import Judge
from tests.bench.workloads_bench import BRIDGED, STAGES, Bench, slug

EPSILON = 0.05
UNFITTED_ROWS = 100
"""At most so many calibrate what is not fitted, which is not expected to pay."""
LOOKED_AT = 64
"""Rows that every layer is looked at with; twice as many fit the heads to look through."""
PERPLEXITY_ROWS = 128
CHARGE_TO = 20_000
TARGETS = (0.99, 0.95, 0.9)
"""Of the search of exit layers, if nothing else is said; see `Bench`."""
STOCK_LAYERS = "20,25"
"""Where none pays at any of them."""

KV_POLICIES = ("propagate", "bridge", "recompute", "verify")

Json = dict[str, Any]


def command(*arguments: str) -> tuple[int, str, float]:
    """Run `eevp-batch`: exit code, standard output and seconds."""
    started = time.perf_counter()
    print("eevp-batch", *arguments, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "eevp_batch", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "EEVP_DASHBOARD": "0"},
    )
    return done.returncode, done.stdout, time.perf_counter() - started


def generate(bench: Bench) -> Json:
    """Write the rows and run them at full depth; a finished output is taken as it is."""
    if not (bench.folder / "job.yaml").exists():
        bench.workload.write(bench.folder, bench.model, bench.dtype)
    if bench.finished is None:
        code, *_ = command("submit", bench.job)
        if code:
            raise SystemExit(f"submit {bench.job}: ended with {code}")
    success = json.loads((bench.out / "_SUCCESS").read_text())
    return {"rows": success["rows"], "tokens": success["totals"]["generated_tokens"]}


def fit(bench: Bench) -> Json:
    """Fit every stage that has a fit of its own; its seconds are those of the whole command."""
    found = {}
    for name in bench.workload.stages:
        options = STAGES[name].fit
        if options is None:
            continue
        rows = ("--from", str(bench.out), "--rows", str(bench.sizes.fit), "--json")
        tries: list[tuple[str, ...]] = [("--target", str(target)) for target in bench.targets]
        if found:
            tries = [("--layers", ",".join(map(str, bench.layers())))]
        # What the search of layers is to reckon with, and whether prompts are to have a bridge.
        bridged = [BRIDGED] * any(BRIDGED in STAGES[s].exit for s in bench.workload.stages)
        exits = (*STAGES[name].exit, *bridged, *bench.fields)
        fields = [part for field in exits for part in ("--set", field)]
        for more in [*tries, ("--layers", STOCK_LAYERS)]:
            given = (*rows, *options, *bench.fit_options, *fields, *more)
            arguments = ("fit", bench.job, str(bench.heads(name)), *given)
            code, text, seconds = command(*arguments)
            if code == 0:
                break
        else:
            raise SystemExit(f"fit {bench.job}: ended with {code}")
        manifest = json.loads(text)
        found[name] = {
            "seconds": seconds,
            "asked_for": [*bench.fit_options, *bench.fields, *more],
            "layers": manifest["exit_layers"],
            "search": manifest["data"].get("search"),
            "rows": manifest["data"]["rows"] + manifest["data"]["held_out_rows"],
            "agreement": {k: h["agreement"] for k, h in manifest["figures"]["heads"].items()},
        }
    return found


def look(bench: Bench) -> Json:
    """What an oracle would save, on rows that nothing was fitted to."""
    job = prepare(bench.job, [])
    config = job.model
    fitting, held_out = split_rows(bench.rows(2 * LOOKED_AT, fitted=True), 0.2, seed=0)
    judged = bench.rows(LOOKED_AT, fitted=False)
    weights = load_job_model(job.spec, config).weights
    model = SegmentedModel(weights, [config.num_layers])
    heads = quick_heads(model, fitting, held_out, range(1, config.num_layers))
    costs = for_job(measured_costs(model, 64, proposal_rank=64), job.spec.exit, judged)
    return measure_potential(model, judged, {"raw": {}, "quick": heads}, costs).to_json()


class _KeptRisk(TokenRisk):
    """Keeps all losses, so that one pass over the rows serves every delta."""

    def __init__(self, replay: Replay) -> None:
        super().__init__(replay)
        self.kept: dict[tuple[float, ...], list[float]] = {}

    def losses(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[float]]:
        found = super().losses(rows, grid)
        self.kept |= dict(zip(map(tuple, grid), found, strict=True))
        return found


def certify(bench: Bench) -> Json:
    """The grid and the certificate of every stage at every delta.

    The path of settings is that of the largest delta; along it each delta has a test of its own.
    """
    unseen = bench.rows(bench.sizes.calibration, fitted=False)
    found = {}
    for name in bench.workload.stages:
        part = f"certify-{slug(name)}"
        if not read_step(bench, part):
            rows = unseen if STAGES[name].heads else unseen[:UNFITTED_ROWS]
            write_json(bench.step_file(part), _certified(bench, name, rows))
        found[name] = read_step(bench, part)
    return found


def _certified(bench: Bench, name: str, rows: Sequence[Row]) -> Json:
    """What one stage's exits come to, and a certificate in a file for each delta that has one."""
    started, tuning = time.perf_counter(), round(TUNING_SHARE * len(rows))
    job = prepare(bench.job, bench.exit_fields(name))
    weights, tokenizer, *_ = load_job_model(job.spec, job.model)
    cut = cut_model(weights, tokenizer, job.spec.exit)
    settings = replay_settings(cut, job.spec)
    risk = _KeptRisk(Replay(cut.model, settings))
    result = calibrate(
        cut.model,
        settings,
        rows[:tuning],
        rows[tuning:],
        delta=max(bench.deltas),
        epsilon=EPSILON,
        costs=job_costs(cut, job.spec.exit, rows[:tuning]),
        grid=bench.settings,
        risk=risk,
        say=print,
    )
    deltas = {f"{delta:g}": at_delta(result, risk.kept, delta) for delta in bench.deltas}
    for delta, tested in deltas.items():
        if tested.chosen is not None:
            binding = job_binding(job.spec, job.model)
            certificate = tested.to_calibration(binding, {"workload": bench.folder.name})
            certificate.save(bench.certificate(name, float(delta)))
    taken = time.perf_counter() - started
    return {"seconds": taken, "deltas": {d: tested.to_json() for d, tested in deltas.items()}}


def at_delta(
    result: CalibrationResult, kept: Mapping[tuple[float, ...], Losses], delta: float
) -> CalibrationResult:
    """What the same losses, in the same order, certify at a smaller delta."""
    placed = [(s.place, n) for n, s in enumerate(result.settings) if s.place is not None]
    path = [n for _, n in sorted(placed) if result.settings[n].thresholds in kept]
    losses = [kept[result.settings[n].thresholds] for n in path]
    settings = list(result.settings)
    for number, some in zip(path, losses, strict=True):
        value = p_value("betting", some, delta, epsilon=EPSILON, seed=0)
        settings[number] = replace(settings[number], p_value=value)
    certified, reason, needed = None, None, None
    least = least_rows("betting", delta, EPSILON)
    if result.num_rows < least:
        reason, needed = f"{least} calibration rows are the fewest that could", least
    elif (last := certified_place(losses, delta, EPSILON)) is not None:
        certified = path[last]
    else:
        needed = rows_needed_by_betting(losses[0], delta, EPSILON)
        reason = f"the most cautious thresholds have a risk of {mean(losses[0]):.4f}"
    return replace(
        result,
        delta=delta,
        settings=tuple(settings),
        certified=certified,
        reason=reason,
        rows_needed=needed,
    )


def points(bench: Bench) -> dict[str, list[str]]:
    """What was certified, by stage and delta: the same thresholds only once, and nothing that is
    predicted to be no faster than full depth."""
    found: dict[str, list[str]] = {}
    for stage, kept in read_step(bench, "certify").items():
        seen = []
        for delta in bench.deltas:
            setting = certified_setting(kept["deltas"][f"{delta:g}"])
            if setting is None or setting["thresholds"] in seen or setting["speed"] <= 1:
                continue
            seen.append(setting["thresholds"])
            file = f"exit.calibration={bench.certificate(stage, delta).name}"
            found[f"{stage}, {1 - delta:.0%}"] = [*bench.exit_fields(stage), file]
    return found


def certified_setting(result: Json) -> Json | None:
    """The certified one of a calibration's settings."""
    if result["certified"] is None:
        return None
    setting: Json = result["settings"][result["certified"]]
    return setting


def pay(bench: Bench) -> Json:
    """Speed and outputs of all certified exits beside exits off, in turns, on the judged rows."""
    trial = Trial(
        job=bench.job,
        overrides=["input.path=judged.parquet"],
        points=points(bench),
        rows=bench.sizes.judged,
        rounds=bench.rounds,
        processes=bench.processes,
    )
    measured = measure(trial)
    found = figures(measured, bench.workload.answer)
    fits = read_step(bench, "fit")
    for name, point in found["points"].items():
        heads = STAGES[name.rpartition(",")[0]].heads
        cost = fits[heads]["seconds"] if heads else 0.0
        point |= charged(found[OFF], point, cost, bench.sizes.fit, CHARGE_TO)
    outputs = {
        name: [some[n].token_ids for n in sorted(some)] for name, some in measured.outputs.items()
    }
    prompts = [measured.prompts[n] for n in sorted(measured.prompts)]
    write_json(bench.folder / "outputs.json", {"prompts": prompts, "outputs": outputs}, None)
    return found


def policies(bench: Bench) -> Json:
    """Every KV policy at the thresholds that were certified for the bridge, in turns."""
    chosen: list[list[float]] = []
    for result in read_step(bench, "certify")["heads"]["deltas"].values():
        setting = certified_setting(result)
        if setting is not None and setting["thresholds"] not in chosen:
            chosen.append(setting["thresholds"])
    fields = [field for field in bench.exit_fields("heads") if not field.startswith("exit.kv=")]
    whole = {"verify": ["exit.vocab.final_head=full"]}  # it takes nothing else
    trial = Trial(
        job=bench.job,
        overrides=["input.path=judged.parquet"],
        points={
            f"{kv}, {number}": [
                *fields,
                f"exit.kv={kv}",
                *whole.get(kv, []),
                f"exit.threshold={compact(thresholds)}",
            ]
            for kv in KV_POLICIES
            for number, thresholds in enumerate(chosen)
        },
        rows=bench.sizes.judged,
        rounds=bench.rounds,
        processes=bench.processes,
    )
    return figures(measure(trial), bench.workload.answer) | {"thresholds": chosen}


def compact(values: Sequence[float]) -> str:
    """A list as an override takes it: without blanks."""
    return json.dumps(values, separators=(",", ":"))


def judge(bench: Bench) -> Json:
    """Perplexity of what was generated, under the whole model in float32."""
    kept = json.loads((bench.folder / "outputs.json").read_text())
    judge = Judge(str(bench.model), os.cpu_count() or 1)
    prompts = kept["prompts"][:PERPLEXITY_ROWS]
    found = {}
    for name, outputs in kept["outputs"].items():
        score = judge.mean_log_probability(prompts, outputs[:PERPLEXITY_ROWS])
        found[name] = {"rows": len(prompts), "perplexity": math.exp(-score)}
    return found


def audit(bench: Bench) -> Json:
    """Jobs over the judged rows with certified exits, every other row audited at full depth.

    Of each stage the boldest certificate, which has the most to lose.
    """
    found = {}
    boldest = {name.rpartition(",")[0]: (name, fields) for name, fields in points(bench).items()}
    for number, (name, fields) in enumerate(boldest.values()):
        more = [*fields, "audit.full_depth_fraction=0.5", f"output.path=audited-{number}"]
        overrides = [part for field in more for part in ("--set", field)]
        code, _, _ = command("submit", str(bench.folder / "judged.yaml"), *overrides)
        if code:
            raise SystemExit(f"submit with {name}: ended with {code}")
        figures = summarise(Store.open(str(bench.folder / f"audited-{number}"))).audit
        assert figures is not None, "half of the rows are audited"
        found[name] = figures.to_json()
    return found


STEPS: dict[str, Callable[[Bench], Json]] = {
    "generate": generate,
    "fit": fit,
    "look": look,
    "certify": certify,
    "pay": pay,
    "policies": policies,
    "judge": judge,
    "audit": audit,
}
"""In their order. `fit`, `pay` and `policies` are timed: nothing else should run meanwhile."""


def read_step(bench: Bench, name: str) -> Json:
    """What a step found; empty before it was made."""
    path = bench.step_file(name)
    found: Json = json.loads(path.read_text()) if path.exists() else {}
    return found


def run_step(bench: Bench, name: str) -> None:
    """Make a step, unless it has been made."""
    if not bench.step_file(name).exists():
        print(f"{bench.folder.name}: {name}", flush=True)
        write_json(bench.step_file(name), STEPS[name](bench))
