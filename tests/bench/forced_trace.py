"""What skipped layers are worth: tokens leave by script, and the time is held against the FLOPs.

    python -m tests.bench.forced_trace --out trace.json

For every exit layer, KV policy and share f of tokens that leave, the same rows are run with exits
off and with the script, in turn. The ideal replays what every row did and counts multiply-adds, see
`costs.py`: layers and heads that a token needs, the head at the exit charged to every token, keys
and values of skipped layers as the policy fills them, prompts as they are. The second table runs
the same trace under policies that keep a batch together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine, load_weights
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec, VocabSpec
from tests.bench import machine
from tests.bench.costs import Costs, Exit, Work
from tests.bench.prompts import chat_prompts
from tests.bench.trace import POLICIES, force, keep_together

TARGET, MOST_LOSS = 0.85, 0.05
"""Least share of the ideal where tokens leave; most loss where none does."""

LEGEND = """
mean: layer that tokens left after. measured: tokens/s to exits off, median of the rounds' ratios.
ideal: multiply-adds with exits off to those that these rows needed. share: measured to ideal.
forced out, held back: share of the tokens at the exit that did not do what the trace says. others:
cores that other processes used, the most of any run."""


@dataclass(frozen=True)
class Run:
    """One pass over all rows.

    Attributes:
        tokens_per_s: generated tokens by seconds.
        exit_layers: per row, the layer that each token left after.
        shared_tokens: prompt tokens that another row had computed.
        foreign_cores: what else the machine was doing.
    """

    tokens_per_s: float
    exit_layers: list[list[int]]
    shared_tokens: int
    foreign_cores: float

    @property
    def mean_exit_layer(self) -> float:
        return statistics.fmean(layer for row in self.exit_layers for layer in row)


class Bench:
    """Engines over one model, each built once, and the rows that they run."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._spec = ModelSpec(path=chosen.model, dtype=chosen.dtype)
        self._config = read_model_config(self._spec)
        self._tokenizer = load_tokenizer(self._config, self._spec)
        self._weights = load_weights(self._spec, self._config)
        self._costs = Costs.of(self._weights.config)
        prompts = chat_prompts(chosen.model, min(chosen.rows, 192))
        self._prompts = [prompts[row % len(prompts)] for row in range(chosen.rows)]
        self._engines: dict[tuple[Any, ...], Engine] = {}

    def off(self) -> Engine:
        """The engine with exits off."""
        return self._built(("off",), ExitSpec(mode="off"), EngineSpec())

    def with_exit(self, layer: int, kv: str) -> Engine:
        """The engine with one exit before the last layer."""
        return self._built((layer, kv), self._exits(layer, kv), EngineSpec())

    def kept_together(self, layer: int) -> Engine:
        """The same over one batch that is never parted, as large as the other's."""
        batch = self._chosen.naive_batch or self.with_exit(layer, "propagate").queues.max_batch
        limits = EngineSpec(max_batch=batch, max_resident=batch)
        engine = self._built((layer, "together"), self._exits(layer, "propagate"), limits)
        keep_together(engine)
        return engine

    def _exits(self, layer: int, kv: str) -> ExitSpec:
        vocab: dict[str, Any] = {
            "top_k": self._chosen.top_k,
            "final_head": self._chosen.final_head,
        }
        if self._chosen.proposal:
            vocab["proposal"] = self._chosen.proposal
        return ExitSpec(layers=[layer], kv=kv, vocab=VocabSpec(**vocab))  # type: ignore[arg-type]

    def _built(self, key: tuple[Any, ...], exits: ExitSpec, limits: EngineSpec) -> Engine:
        if key not in self._engines:
            sampling = SamplingSpec(max_new_tokens=self._chosen.new_tokens)
            engine = build_engine(self._weights, self._tokenizer, exits, sampling, limits)
            force(engine, 0.5)
            self.run(engine, limit=8)
            self._engines[key] = engine
        return self._engines[key]

    def run(self, engine: Engine, limit: int | None = None) -> Run:
        """Generate for all rows, or the first so many."""
        prompts = [Prompt(row, ids) for row, ids in enumerate(self._prompts[:limit])]
        shared = engine.stats.shared_tokens
        meter, started = machine.CpuMeter(os.getpid()), time.perf_counter()
        found = list(engine.generate(prompts))
        seconds = time.perf_counter() - started
        foreign = meter.read()["foreign_cores"]
        rows: list[list[int]] = [[] for _ in prompts]
        for result in found:
            if not isinstance(result, Generation):
                raise SystemExit(f"row {result.row_id} failed: {result.message}")
            rows[int(result.row_id)] = result.exit_layers
        shared = engine.stats.shared_tokens - shared
        return Run(sum(map(len, rows)) / seconds, rows, shared, foreign)

    def work(self, run: Run, exit: Exit | None) -> Work:
        """What the rows of a run needed; a shared beginning counts for none of them."""
        total = Work(layers=-self._costs.prompt(run.shared_tokens).layers)
        for prompt, layers in zip(self._prompts, run.exit_layers, strict=True):
            if exit is None:
                total += self._costs.full_depth(len(prompt), len(layers))
            else:
                total += self._costs.with_exit(len(prompt), layers, exit)
        return total


def in_turn(bench: Bench, engine: Engine, rounds: int) -> tuple[list[Run], list[Run]]:
    """Runs with exits off and of `engine`, one of each per round, who begins changing."""
    off = bench.off()
    pairs = []
    for number in range(rounds):
        if number % 2:
            last = bench.run(engine)
            pairs.append((bench.run(off), last))
        else:
            pairs.append((bench.run(off), bench.run(engine)))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def speeds(off: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept of the rounds of a setting."""
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(off, runs, strict=True)]
    return {
        "off_tokens_per_s": [run.tokens_per_s for run in off],
        "tokens_per_s": [run.tokens_per_s for run in runs],
        "measured": statistics.median(ratios),
        "mean_exit_layer": runs[-1].mean_exit_layer,
        "foreign_cores": max(run.foreign_cores for run in (*off, *runs)),
    }


def grouped(bench: Bench, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every exit layer, policy and share, against exits off."""
    print(f"{'layer':>6}{'kv':>11}{'f':>6}{'tok/s':>9}{'off':>9}{'mean':>8}{'measured':>10}"
          f"{'ideal':>8}{'share':>8}  others")  # fmt: skip
    rows = []
    settings = [(a, b, c) for a in chosen.layers for b in chosen.kv for c in chosen.fractions]
    for layer, kv, fraction in settings:
        engine = bench.with_exit(layer, kv)
        force(engine, fraction)
        off, runs = in_turn(bench, engine, chosen.rounds)
        exit = Exit(layer, kv, chosen.final_head, chosen.proposal or "full", chosen.top_k)
        full, needed = bench.work(off[-1], None).total, bench.work(runs[-1], exit)
        row = {"layer": layer, "kv": kv, "fraction": fraction, **speeds(off, runs)}
        row["ideal"] = full / needed.total
        row["ideal_without_first_head"] = full / (needed.total - needed.first_head)
        row["share_of_ideal"] = row["measured"] / row["ideal"]
        rows.append(row)
        print(
            f"{layer:6}{kv:>11}{fraction:6.1f}{statistics.median(row['tokens_per_s']):9.1f}"
            f"{statistics.median(row['off_tokens_per_s']):9.1f}{row['mean_exit_layer']:8.2f}"
            f"{row['measured']:10.3f}{row['ideal']:8.3f}{row['share_of_ideal']:8.1%}"
            f"{row['foreign_cores']:8.2f}",
            flush=True,
        )
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The targets, and how far each setting is from them."""
    leaving = [row for row in rows if row["fraction"] > 0]
    staying = [row for row in rows if row["fraction"] == 0]
    lines = []
    if leaving:
        met = sum(row["share_of_ideal"] >= TARGET for row in leaving)
        least = min(leaving, key=lambda row: float(row["share_of_ideal"]))
        lines.append(
            f"share of the ideal: at least {TARGET:.0%} in {met} of {len(leaving)} settings; least "
            f"{least['share_of_ideal']:.1%} ({least['kv']}, layer {least['layer']}, f = "
            f"{least['fraction']})"
        )
    for row in staying:
        lines.append(
            f"f = 0, {row['kv']}, layer {row['layer']}: loss {1 - row['measured']:.1%} against "
            f"exits off, of which the head at the exit must cost {1 - row['ideal']:.1%}; without "
            f"it {1 - row['share_of_ideal']:.1%} (at most {MOST_LOSS:.0%} is asked for)"
        )
    return "\n".join(lines)


def naive(bench: Bench, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Grouping by depth against policies that keep a batch together, on the same trace."""
    print(f"\n{'layer':>6}{'f':>6}  {'policy':14}{'batch':>6}{'tok/s':>9}{'measured':>10}"
          f"{'mean':>8}{'forced out':>12}{'held back':>11}  others")  # fmt: skip
    rows = []
    settings = [(a, b, c) for a in chosen.layers for b in chosen.fractions for c in POLICIES]
    for layer, fraction, policy in settings:
        is_ours = policy == "grouped"
        engine = bench.with_exit(layer, "propagate") if is_ours else bench.kept_together(layer)
        forced = force(engine, fraction, policy)
        row = {
            "layer": layer,
            "fraction": fraction,
            "policy": policy,
            "batch": engine.queues.max_batch,
            **speeds(*in_turn(bench, engine, chosen.rounds)),
            "forced_out": forced.num_forced_out / forced.num_decided,
            "held_back": forced.num_held_back / forced.num_decided,
        }
        rows.append(row)
        print(
            f"{layer:6}{fraction:6.1f}  {policy:14}{row['batch']:6}"
            f"{statistics.median(row['tokens_per_s']):9.1f}{row['measured']:10.3f}"
            f"{row['mean_exit_layer']:8.2f}{row['forced_out']:12.1%}{row['held_back']:11.1%}"
            f"{row['foreign_cores']:8.2f}",
            flush=True,
        )
    return rows


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20])
    parser.add_argument(
        "--kv", nargs="+", default=["propagate", "recompute"], choices=["propagate", "recompute"]
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.9])
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--final-head", default="full", choices=["full", "pruned"])
    parser.add_argument("--proposal", choices=["full", "int8", "low_rank"])
    parser.add_argument("--naive-batch", type=int, help="sequences kept together; as many as ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    """Run, print, keep."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen)
    found: dict[str, Any] = {"setup": machine.setup() | vars(chosen)}
    found["grouped"] = grouped(bench, chosen)
    print(verdict(found["grouped"]))
    if not chosen.skip_naive:
        found["naive"] = naive(bench, chosen)
    print(LEGEND)
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
