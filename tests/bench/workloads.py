"""What fitted exits bring on four workloads: fitted, certified, and judged on other rows.

    python -m tests.bench.workloads --folder out/workloads --gsm8k gsm8k_train.jsonl \
        --self-instruct self_instruct_seed_tasks.jsonl --out FILE

Every step leaves a file in the workload's folder and is not made again; `--steps` and `--workloads`
name some of them, so that a long run can be cut into pieces. `fit`, `pay` and `policies` are timed
and want a quiet machine; the others do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from eevp_batch.report.svg import line_chart
from tests.bench.exits_pay import OFF
from tests.bench.machine import setup, write_json
from tests.bench.workloads_bench import STAGES, Bench
from tests.bench.workloads_jobs import WORKLOADS, Sizes
from tests.bench.workloads_steps import (
    KV_POLICIES,
    STEPS,
    TARGETS,
    Json,
    certified_setting,
    read_step,
    run_step,
)

COLUMNS = (
    "workload", "oracle", "exits after", "stage", "certified", "leave", "layers", "speed",
    "charged", "tokens differ", "edit", "perplexity", "right",
)  # fmt: skip


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/workloads"))
    parser.add_argument("--workloads", type=_names, default=list(WORKLOADS), metavar="A,B")
    parser.add_argument("--steps", type=_names, default=list(STEPS), metavar="A,B")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stage", dest="stages", action="append", choices=list(STAGES))
    parser.add_argument("--gsm8k", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--self-instruct", type=Path, help="JSON lines with instruction")
    parser.add_argument(
        "--finished", type=_pair_of, action="append", default=[], metavar="WORKLOAD=OUT",
        help="a finished full-depth output of the same rows",
    )  # fmt: skip
    parser.add_argument("--fit-rows", type=int, default=350)
    parser.add_argument("--calibration-rows", type=int, default=450)
    parser.add_argument("--judged-rows", type=int, default=192)
    parser.add_argument(
        "--targets", type=_numbers, default=list(TARGETS),
        help="unchanged tokens that the search of layers asks for; the next where none pays",
    )  # fmt: skip
    parser.add_argument(
        "--fit-options", type=str.split, default=["--proposal-rank", "64"], metavar="OPTIONS",
        help="of every fit, in one string",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="fields", action="append", default=[], metavar="FIELD=VALUE",
        help="of the job, for all stages with heads",
    )  # fmt: skip
    parser.add_argument("--deltas", type=_numbers, default=[0.01, 0.02, 0.05])
    parser.add_argument("--settings", type=int, default=12, help="thresholds that are tried")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="that share rows and cores")
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    parser.add_argument("--plot", type=Path, help="folder for a chart (SVG) of each workload")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _pair_of(text: str) -> tuple[str, Path]:
    name, _, out = text.partition("=")
    return name, Path(out)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _names(text)]


def bench_of(name: str, chosen: argparse.Namespace) -> Bench:
    """A workload as the command line wants it."""
    sizes = Sizes(chosen.fit_rows, chosen.calibration_rows, chosen.judged_rows)
    source = {"gsm8k": chosen.gsm8k, "self-instruct": chosen.self_instruct}.get(name)
    workload = WORKLOADS[name](sizes, source)
    if chosen.stages is not None:
        workload = replace(workload, stages=tuple(chosen.stages))
    return Bench(
        workload=workload,
        model=chosen.model,
        dtype=chosen.dtype,
        folder=chosen.folder / name,
        sizes=sizes,
        deltas=chosen.deltas,
        settings=chosen.settings,
        targets=chosen.targets,
        rounds=chosen.rounds,
        processes=chosen.processes,
        fit_options=chosen.fit_options,
        fields=chosen.fields,
        finished=dict(chosen.finished).get(name),
    )


def lines(bench: Bench) -> Iterator[list[str]]:
    """The table's lines of a workload: one for each stage and delta."""
    found = {name: read_step(bench, name) for name in STEPS}
    oracle = ", ".join(f"{x['oracle_saving']:.0%}" for x in found["look"].get("lenses", []))
    for stage, kept in found["certify"].items():
        seen: dict[tuple[float, ...], str] = {}
        for delta in bench.deltas:
            result = kept["deltas"][f"{delta:g}"]
            layers = ", ".join(map(str, result["exit_layers"][:-1]))
            start = [bench.folder.name, oracle, layers, stage]
            setting = certified_setting(result)
            if setting is None:
                needed = result["rows_needed"]
                yield [*start, f"{1 - delta:.0%}: no" + (f", {needed} rows" if needed else "")]
                continue
            name = seen.setdefault(tuple(setting["thresholds"]), f"{stage}, {1 - delta:.0%}")
            yield [*start, f"{1 - delta:.0%}", *_measured(found, name, setting)]


def _measured(found: dict[str, Json], name: str, setting: Json) -> list[str]:
    """What came of a certified setting on the judged rows; in brackets where it was not run."""
    point = found["pay"].get("points", {}).get(name)
    if point is None:
        predicted = (setting["exit_share"], setting["mean_layer"], setting["speed"])
        return [f"({predicted[0]:.0%})", *(f"({value:.2f})" for value in predicted[1:])]
    perplexity = [found["judge"].get(n, {}).get("perplexity") for n in (OFF, name)]
    right = [x.get("right_answers") for x in (found["pay"][OFF], point)]
    return [
        f"{point['leaving']:.0%}",
        f"{point['mean_exit_layer']:.1f}",
        f"{point['speed']:.2f}",
        f"{point['charged']:.2f}",
        f"{point['disagreement']:.2%}",
        f"{point['edit_distance']:.1%}",
        _pair(perplexity, ".2f"),
        _pair(right, ".1%"),
    ]


def _pair(values: list[Any], form: str) -> str:
    return "-" if None in values else " / ".join(format(value, form) for value in values)


def chart(bench: Bench) -> str | None:
    """Agreement against speed: every KV policy, full depth, and what was certified; SVG."""
    found = read_step(bench, "policies")
    if not found:
        return None
    drawn = {"full depth": [(1.0, 1.0)]}
    for kv in KV_POLICIES:
        some = [p for name, p in found["points"].items() if name.startswith(f"{kv},")]
        drawn[kv] = sorted((p["speed"], 1 - p["disagreement"]) for p in some)
    labels: dict[str, list[str]] = {}
    for name, point in read_step(bench, "pay").get("points", {}).items():
        stage, _, certified = name.rpartition(", ")
        line = f"certified: {stage}"
        drawn.setdefault(line, []).append((point["speed"], 1 - point["disagreement"]))
        labels.setdefault(line, []).append(certified)
    lowest = min(y for some in drawn.values() for _, y in some)
    return line_chart(
        title=f"Quality against speed, {bench.folder.name}",
        x_label="speed, as a multiple of exits off",
        y_label="tokens as at full depth",
        lines=drawn,
        y_range=(lowest - 0.05 * (1 - lowest) - 0.001, 1.0),
        labels=labels,
    )


def main() -> None:
    """Make the steps that are missing, and print what all of them found."""
    chosen = options()
    benches = [bench_of(name, chosen) for name in chosen.workloads]
    for bench in benches:
        for step in STEPS:
            if step in chosen.steps:
                run_step(bench, step)
    rows = [line for bench in benches for line in lines(bench)]
    for cells in (list(COLUMNS), *rows):
        print("| " + " | ".join([*cells, *[""] * (len(COLUMNS) - len(cells))]) + " |")
    if chosen.out is not None:
        kept = {bench.folder.name: {s: read_step(bench, s) for s in STEPS} for bench in benches}
        write_json(chosen.out, {"setup": setup(), "workloads": kept})
    for bench in benches:
        drawn = chart(bench) if chosen.plot is not None else None
        if drawn is not None:
            chosen.plot.mkdir(parents=True, exist_ok=True)
            (chosen.plot / f"{bench.folder.name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
