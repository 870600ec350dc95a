"""Whether cost grows linearly with the rows, and what a shared prompt prefix saves.

    python -m tests.bench.scaling rows --rows 200,5000 --max-new-tokens 16
    python -m tests.bench.scaling prefix --rows 64 --prefix-tokens 1000

`rows` runs the prompts of the throughput benchmark over and over, the smallest number of rows once
more at the end, each number in a process of its own; it prints tokens per second and memory, also
by fifths of the rows. `prefix` puts the same tokens before every prompt and runs with sharing and
without it in turn. A warm-up is excluded from both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from tests.bench.launch import Rivals, Running, start
from tests.bench.machine import setup, write_json
from tests.bench.prompts import chat_prompts
from tests.bench.quality import agreement
from tests.bench.systems import OFF, ON
from tests.bench.throughput import end_ids

PREFIX_TEXT = (
    "You are a careful assistant. Answer in plain words, name what you are not sure of, and keep "
    "to the question. Here is an example of a good answer, number {}: the tide follows the moon. "
)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost by rows, and with a shared prefix.")
    parser.add_argument("what", choices=["rows", "prefix"])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exits", choices=["off", "on"], default="off")
    parser.add_argument("--batch", default="auto", help="auto, or sequences per forward pass")
    parser.add_argument("--rows", help="rows: 200,5000; prefix: 64")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2, help="of `prefix`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    return parser.parse_args()


def setting_of(chosen: argparse.Namespace, **limits: Any) -> dict[str, Any]:
    """Our engine with these limits beside the batch that was asked for."""
    batch = chosen.batch if chosen.batch == "auto" else int(chosen.batch)
    return {
        "engine": "eevp",
        "dtype": chosen.dtype,
        "exit": ON if chosen.exits == "on" else OFF,
        "limits": {"max_batch": batch, **limits},
    }


def make_request(chosen: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """What every process is asked; the warm-up is a few rows."""
    return {
        "model": chosen.model,
        "prompts": prompts,
        "max_new_tokens": chosen.max_new_tokens,
        "end_ids": end_ids(chosen.model),
        "threads": chosen.threads,
        "warm_up": 8,
    }


def by_fifths(run: dict[str, Any]) -> list[dict[str, float]]:
    """Tokens per second of each fifth of a run's rows, and resident memory at its end."""
    marks = [mark for mark in run["marks"] if mark["rows"] != 1]
    return [
        {
            "rows": after["rows"],
            "tokens_per_s": (after["tokens"] - before["tokens"])
            / (after["seconds"] - before["seconds"]),
            "rss_mib": after["rss_bytes"] / 2**20,
        }
        for before, after in itertools.pairwise(marks)
    ]


def figures(system: Running) -> dict[str, Any]:
    """What is kept of a process's runs."""
    return {
        "setting": system.setting,
        "tokens_per_s": system.rates,
        "tokens": system.tokens,
        "seconds": [run["seconds"] for run in system.runs],
        "rss_mib": max(fifth["rss_mib"] for run in system.runs for fifth in by_fifths(run)),
        "peak_rss_mib": max(run["peak_rss_bytes"] for run in system.runs) / 2**20,
        "foreign_cores": [round(run["foreign_cores"], 2) for run in system.runs],
        "fifths": [by_fifths(run) for run in system.runs],
    }


def run_rows(chosen: argparse.Namespace) -> dict[str, Any]:
    """Every number of rows once, and the smallest once more."""
    counts = sorted(int(number) for number in (chosen.rows or "200,5000").split(","))
    request = make_request(chosen, chat_prompts(chosen.model, 192))
    rivals = Rivals()
    systems = {
        count: start(f"{count} rows", setting_of(chosen), request, rivals) for count in counts
    }
    for count in [*counts, counts[0]]:
        systems[count].run(count)
        print(f"{count} rows: {systems[count].rates[-1]:.1f} tok/s", flush=True)
    for system in systems.values():
        system.end()
    found = {system.name: figures(system) for system in systems.values()}
    for name, kept in found.items():
        print(f"\n{name}: RSS {kept['rss_mib']:.0f} MiB, peak {kept['peak_rss_mib']:.0f} MiB")
        print(f"{'rows done':>10}{'tok/s':>10}{'RSS MiB':>10}")
        for fifth in kept["fifths"][0]:
            print(f"{fifth['rows']:10}{fifth['tokens_per_s']:10.1f}{fifth['rss_mib']:10.0f}")
    small, large = systems[counts[0]], systems[counts[-1]]
    grown = found[large.name]["rss_mib"] - found[small.name]["rss_mib"]
    print(f"\n{large.name} / {small.name}: {large.rate / small.rate:.3f}; RSS {grown:+.0f} MiB")
    return {"systems": found, "ratio": large.rate / small.rate, "rss_growth_mib": grown}


def prefix_ids(model_path: str, count: int) -> list[int]:
    """`count` token ids of plain text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids: list[int] = []
    for number in itertools.count(1):
        if len(ids) >= count:
            break
        ids += tokenizer(PREFIX_TEXT.format(number), add_special_tokens=False)["input_ids"]
    return ids[:count]


def run_prefix(chosen: argparse.Namespace) -> dict[str, Any]:
    """The same rows with sharing and without it, in turn."""
    rows = int(chosen.rows or 64)
    prefix = prefix_ids(chosen.model, chosen.prefix_tokens)
    prompts = [[*prefix, *ids] for ids in chat_prompts(chosen.model, min(rows, 192))]
    request = make_request(chosen, prompts)
    systems = {
        name: start(name, setting_of(chosen, prefix_sharing=shares), request, Rivals())
        for name, shares in (("shared", True), ("not shared", False))
    }
    for number in range(chosen.rounds):
        for name, system in systems.items():
            system.run(rows)
            print(f"round {number + 1}: {name} {system.rates[-1]:.1f} tok/s", flush=True)
    for system in systems.values():
        system.end()
    shared, alone = systems["shared"], systems["not shared"]
    ratios = [a / b for a, b in zip(shared.rates, alone.rates, strict=True)]
    ratio = statistics.median(ratios)
    identical, share = agreement(shared.outputs, alone.outputs)
    print(
        f"\n{rows} rows that share {len(prefix)} tokens: {shared.rate:.1f} tok/s with sharing, "
        f"{alone.rate:.1f} without, ratio {ratio:.2f}; {identical} rows identical, "
        f"agreement {share:.3f}"
    )
    return {
        "systems": {name: figures(system) for name, system in systems.items()},
        "rows": rows,
        "prefix_tokens": len(prefix),
        "ratios": ratios,
        "ratio": ratio,
        "identical_rows": identical,
        "agreement": share,
    }


def main() -> None:
    """Run what was asked for and keep its figures."""
    chosen = options()
    found = run_rows(chosen) if chosen.what == "rows" else run_prefix(chosen)
    about = {
        **setup(),
        "threads": chosen.threads,
        "model": Path(chosen.model).name,
        "max_new_tokens": chosen.max_new_tokens,
    }
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    write_json(chosen.out, {"setup": about, **found})


if __name__ == "__main__":
    main()
