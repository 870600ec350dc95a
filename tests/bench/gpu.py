"""Tokens per second on a GPU: exits by script on a Llama-3-8B-shaped random model, without Ray.

    python -m tests.bench.gpu --out gpu.json
    python -m tests.bench.gpu --device cpu --shape tiny --batches 1 4    # does the script run

Random weights cannot be confident, so a trace (see `trace.py`) says who leaves at `--exit-layer`;
under `verify` the last layer then takes most drafts back, which its acceptance column shows. Beside
it stand `transformers` continuous batching on the same model and prompts, and the floor of reading
all weights and keys/values once per step at the rate at which this device copies memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from eevp_batch.engine.load import build_engine
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec
from tests.bench import machine
from tests.bench.trace import force

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
RIVAL = "transformers-continuous"
POLICIES = ("off", "propagate", "recompute", "verify")


class NoText:
    """A tokenizer for ids that mean nothing."""

    eos_token_id = None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Nothing."""
        return ""


def build_model(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made where they stay."""
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=None
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def copy_rate(device: str) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def make_prompts(chosen: argparse.Namespace, batch: int) -> list[list[int]]:
    """Prompts of `--prompt-tokens` ids; no two begin alike."""
    vocab = SHAPES[chosen.shape]["vocab_size"]
    return [
        [(7 * row + 3 * i * i + 11) % vocab for i in range(chosen.prompt_tokens)]
        for row in range(batch)
    ]


def ours(
    model: PreTrainedModel, chosen: argparse.Namespace, batch: int, policy: str
) -> dict[str, Any]:
    """This engine under a KV policy, or at full depth."""
    exits = ExitSpec(mode="off")
    if policy != "off":
        exits = ExitSpec(layers=[chosen.exit_layer], kv=policy)  # type: ignore[arg-type]
    tokens = batch * (chosen.prompt_tokens + chosen.new_tokens + 32)
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 4
    engine = build_engine(
        model,
        NoText(),
        exits,
        SamplingSpec(max_new_tokens=chosen.new_tokens),
        EngineSpec(max_batch=batch, max_resident=batch, kv_memory=2 * tokens * per_token),
    )
    force(engine, chosen.fraction)

    def run() -> int:
        rows = enumerate(make_prompts(chosen, batch))
        found = list(engine.generate(Prompt(i, ids) for i, ids in rows))
        if not all(isinstance(result, Generation) for result in found):
            raise SystemExit(f"a row failed: {found}")
        return batch * chosen.new_tokens

    figures = timed(run, chosen)
    judged = engine.stats.accepted_drafts.total() + engine.stats.rejected_drafts.total()
    if judged:
        figures["accepted"] = engine.stats.accepted_drafts.total() / judged
    return figures


def continuous(
    model: PreTrainedModel, chosen: argparse.Namespace, batch: int, _: str
) -> dict[str, Any]:
    """`transformers` continuous batching."""
    model.config._attn_implementation = "sdpa"
    settings = GenerationConfig(
        max_new_tokens=chosen.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = make_prompts(chosen, batch)

    def run() -> int:
        found = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
        return sum(len(result.generated_tokens) for result in found.values())

    return timed(run, chosen)


def timed(run: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of `--rounds` runs after one that does not count."""
    run()
    rates = []
    for _ in range(chosen.rounds):
        wait(chosen.device)
        started = time.perf_counter()
        tokens = run()
        wait(chosen.device)
        rates.append(tokens / (time.perf_counter() - started))
    return {"tokens_per_s": rates}


def floor(model: PreTrainedModel, chosen: argparse.Namespace, batch: int, rate: float) -> float:
    """Tokens per second if a step took only the reading of weights and keys/values."""
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    size = model.lm_head.weight.element_size()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * size
    context = chosen.prompt_tokens + chosen.new_tokens / 2
    embedding = model.model.embed_tokens.weight.nbytes
    weights = sum(p.nbytes for p in model.parameters()) - embedding
    return batch * rate / (weights + batch * context * per_token)


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--exit-layer", type=int, help="default: a third of the layers")
    parser.add_argument("--fraction", type=float, default=0.6, help="of tokens that leave there")
    parser.add_argument("--systems", nargs="+", default=[RIVAL, *POLICIES])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out")
    chosen = parser.parse_args()
    chosen.exit_layer = chosen.exit_layer or SHAPES[chosen.shape]["num_hidden_layers"] // 3 or 1
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    if chosen.device == "cpu":
        print("These are figures of a CPU; they say that the script runs, and nothing of a GPU.")
    model = build_model(chosen.shape, chosen.device, dtype)
    rate = copy_rate(chosen.device)
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else machine.cpu_model()
    print(f"{name}, copies at {rate / 1e9:.0f} GB/s\nbatch  system        tokens/s   of floor")
    found = []
    for batch in chosen.batches:
        least = floor(model, chosen, batch, rate)
        for system in chosen.systems:
            run = continuous if system == RIVAL else ours
            figures = run(model, chosen, batch, system)
            best = max(figures["tokens_per_s"])
            found.append({"batch": batch, "system": system, "floor_tokens_per_s": least, **figures})
            accepted = f"  accepted {figures['accepted']:.1%}" if "accepted" in figures else ""
            print(f"{batch:5}  {system:24}{best:10.1f}{best / least:8.1%}{accepted}", flush=True)
            gc.collect()
            if chosen.device == "cuda":
                torch.cuda.empty_cache()
    if chosen.out:
        setup = machine.setup() | {"device_name": name, "copy_bytes_per_s": rate} | vars(chosen)
        Path(chosen.out).write_text(json.dumps({"setup": setup, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
