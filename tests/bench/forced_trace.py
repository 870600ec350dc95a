"""What skipped layers are worth: tokens leave by script, and the time is held against the FLOPs.

    python -m tests.bench.forced_trace --out trace.json

For every exit layer, KV policy and share f of tokens that leave, the same rows are run with exits
off and with the script, in turn. The ideal counts multiply-adds: the layers and heads that a token
needs, the head where the vocabulary is cut charged to every token, the keys/values of skipped
layers as the policy fills them, prompts as they are. Attention's reading of keys is in no ideal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine, load_weights
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec, VocabSpec
from tests.bench import machine
from tests.bench.prompts import chat_prompts
from tests.bench.trace import POLICIES, force


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one token."""

    num_layers: int
    layer: float
    head: float
    projection: float  # keys and values of one layer

    @classmethod
    def of(cls, config: PretrainedConfig) -> Costs:
        width, head_size = config.hidden_size, getattr(config, "head_dim", None)
        head_size = head_size or width // config.num_attention_heads
        q, kv = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
        layer = width * (2 * q + 2 * kv + 3 * config.intermediate_size)
        return cls(config.num_hidden_layers, layer, width * config.vocab_size, 2 * width * kv)

    def full(self) -> float:
        """A token through every layer and the head."""
        return self.num_layers * self.layer + self.head

    def with_exit(self, at: int, fraction: float, kv: str, final_head: str) -> float:
        """The mean over tokens of which `fraction` leave after layer `at`."""
        deep = (self.num_layers - at) * self.layer
        last_head = self.head if final_head == "full" else 0.0
        skipped = (self.num_layers - at) * self.projection if kv == "propagate" else deep
        return (
            at * self.layer + self.head + (1 - fraction) * (deep + last_head) + fraction * skipped
        )


def ideal(costs: Costs, prompt: float, chosen: argparse.Namespace, run: dict[str, Any]) -> float:
    """Speed-up over exits off that the multiply-adds allow; `prompt`: prompt tokens of a row."""
    before = prompt * costs.num_layers * costs.layer
    off = before + chosen.new_tokens * costs.full()
    token = costs.with_exit(run["layer"], run["fraction"], run["kv"], chosen.final_head)
    return off / (before + chosen.new_tokens * token)


class Bench:
    """Engines over one model, each built once."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._spec = ModelSpec(path=chosen.model, dtype=chosen.dtype)
        self._config = read_model_config(self._spec)
        self._tokenizer = load_tokenizer(self._config, self._spec)
        self._weights = load_weights(self._spec, self._config)
        self.costs = Costs.of(self._weights.config)
        self.prompts = chat_prompts(chosen.model, chosen.rows)
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self.prompt_tokens = 0.0  # of a row, without what it shares

    def engine(self, layer: int | None, kv: str = "propagate", batch: int | None = None) -> Engine:
        """The engine with one exit, or with exits off."""
        key = (layer, kv, batch)
        if key not in self._engines:
            vocab = VocabSpec(top_k=self._chosen.top_k, final_head=self._chosen.final_head)
            if self._chosen.proposal:
                vocab = VocabSpec(**(vocab.model_dump() | {"proposal": self._chosen.proposal}))
            exits = ExitSpec(mode="off")
            if layer is not None:
                exits = ExitSpec(layers=[layer], kv=kv, vocab=vocab)  # type: ignore[arg-type]
            limits = EngineSpec(max_batch=batch or "auto", max_resident=batch or "auto")
            sampling = SamplingSpec(max_new_tokens=self._chosen.new_tokens)
            self._engines[key] = build_engine(
                self._weights, self._tokenizer, exits, sampling, limits
            )
            force(self._engines[key], 0.0)
            self.run(self._engines[key], limit=8)
        return self._engines[key]

    def run(self, engine: Engine, limit: int | None = None) -> tuple[float, float]:
        """Tokens per second, and the mean layer that tokens left after."""
        shared, started = engine.stats.shared_tokens, time.perf_counter()
        prompts = [Prompt(i, ids) for i, ids in enumerate(self.prompts[:limit])]
        found = [g for g in engine.generate(prompts) if isinstance(g, Generation)]
        seconds = time.perf_counter() - started
        if len(found) < len(prompts):
            raise SystemExit(f"{len(prompts) - len(found)} rows failed")
        shared = engine.stats.shared_tokens - shared
        self.prompt_tokens = (sum(map(len, self.prompts[:limit])) - shared) / len(prompts)
        tokens = sum(g.generated_tokens for g in found)
        return tokens / seconds, statistics.fmean(g.mean_exit_layer for g in found)


def grouped(bench: Bench, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every exit layer, policy and share, against exits off."""
    rows = []
    for layer in chosen.layers:
        for kv in chosen.kv:
            for fraction in chosen.fractions:
                row = {"layer": layer, "kv": kv, "fraction": fraction}
                off, engine = bench.engine(None), bench.engine(layer, kv)
                force(engine, fraction)
                rates = [(bench.run(off)[0], *bench.run(engine)) for _ in range(chosen.rounds)]
                row |= {
                    "off_tokens_per_s": [rate[0] for rate in rates],
                    "tokens_per_s": [rate[1] for rate in rates],
                    "mean_exit_layer": rates[-1][2],
                    "measured": statistics.median(rate[1] / rate[0] for rate in rates),
                    "ideal": ideal(bench.costs, bench.prompt_tokens, chosen, row),
                }
                row["share_of_ideal"] = row["measured"] / row["ideal"]
                rows.append(row)
                print(
                    f"{layer:6}{kv:>11}{fraction:6.1f}{statistics.median(row['tokens_per_s']):9.1f}"
                    f"{row['mean_exit_layer']:8.2f}{row['measured']:10.3f}{row['ideal']:8.3f}"
                    f"{row['share_of_ideal']:8.1%}",
                    flush=True,
                )
    return rows


def naive(bench: Bench, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Grouping by depth against policies that keep a batch together, on the same trace."""
    rows = []
    for layer in chosen.layers:
        for fraction in chosen.fractions:
            for policy in POLICIES:
                off, engine = bench.engine(None), bench.engine(layer, batch=chosen.naive_batch)
                if policy == "grouped":
                    engine = bench.engine(layer)
                forced = force(engine, fraction, policy)
                rates = [(bench.run(off)[0], *bench.run(engine)) for _ in range(chosen.rounds)]
                row = {
                    "layer": layer,
                    "fraction": fraction,
                    "policy": policy,
                    "tokens_per_s": [rate[1] for rate in rates],
                    "measured": statistics.median(rate[1] / rate[0] for rate in rates),
                    "mean_exit_layer": rates[-1][2],
                    "share_overruled": forced.num_forced / forced.num_decided,
                }
                rows.append(row)
                print(
                    f"{layer:6}{fraction:6.1f}  {policy:14}"
                    f"{statistics.median(row['tokens_per_s']):9.1f}{row['measured']:10.3f}"
                    f"{row['mean_exit_layer']:8.2f}{row['share_overruled']:11.1%}",
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
    parser.add_argument("--kv", nargs="+", default=["propagate", "recompute"])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.9])
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--final-head", default="full", choices=["full", "pruned"])
    parser.add_argument("--proposal", help="of the pruned vocabulary: int8 or low_rank")
    parser.add_argument("--naive-batch", type=int, default=64, help="sequences kept together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    """Run, print, keep."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen)
    print(" layer         kv     f    tok/s   layer  measured   ideal   share")
    found = {"setup": machine.setup() | vars(chosen), "grouped": grouped(bench, chosen)}
    if not chosen.skip_naive:
        print("\n layer     f  policy             tok/s  measured   layer  overruled")
        found["naive"] = naive(bench, chosen)
    print(
        "\nlayer (second): mean layer that tokens left after. measured: tokens/s to exits off,"
        "\nround by round. share: measured to ideal. overruled: tokens forced out or held back."
    )
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
