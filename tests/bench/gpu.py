"""Tokens per second on a GPU: exits by script on a Llama-3-8B-shaped random model, without Ray.

    python -m tests.bench.gpu --out gpu.json
    python -m tests.bench.gpu --device cpu --shape tiny --batches 1 4    # does the script run

Random weights cannot be confident, so a trace (see `trace.py`) says who leaves at `--exit-layer`,
and under `verify` also which drafts stand. Every system generates for the same rows, twice as many
as a batch holds, and every token is paid as if it were meant. Beside them stands the floor of a
full-depth step: reading all weights and keys/values once, at the rate at which this device copies
memory. Exits read less, so that they may pass it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from eevp_batch.engine.engine import Engine
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
CONTINUOUS, STATIC = "transformers-continuous", "transformers-static"
POLICIES = ("off", "propagate", "recompute", "verify")
ROWS_PER_BATCH = 2
LARGEST_PAGE = 256
"""Tokens of a page of keys/values at most, whatever kernel attention takes."""
FAILURES = (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)
"""How a rival's other version, or too little memory, shows."""
CPU_WARNING = "These are figures of a CPU: they say that the script runs, and nothing of a GPU."

_log = logging.getLogger(__name__)
Figures = dict[str, Any]


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
        for row in range(ROWS_PER_BATCH * batch)
    ]


def kv_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    size: int = model.lm_head.weight.element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * size


def make_engine(
    model: PreTrainedModel, chosen: argparse.Namespace, batch: int, policy: str
) -> Engine:
    """This engine under a KV policy, or at full depth, with room for all rows."""
    exits = ExitSpec(mode="off")
    if policy != "off":
        exits = ExitSpec(layers=[chosen.exit_layer], kv=policy)  # type: ignore[arg-type]
    row_tokens = chosen.prompt_tokens + chosen.new_tokens + LARGEST_PAGE
    token_bytes = kv_bytes(model) + 4 * model.config.hidden_size  # and its hidden state
    memory = (ROWS_PER_BATCH * batch + 1) * row_tokens * token_bytes
    limits = EngineSpec(max_batch=batch, kv_memory=memory)
    sampling = SamplingSpec(max_new_tokens=chosen.new_tokens)
    engine = build_engine(model, NoText(), exits, sampling, limits)
    force(engine, chosen.fraction, acceptance=chosen.acceptance)
    return engine


def ours(model: PreTrainedModel, chosen: argparse.Namespace, batch: int, policy: str) -> Figures:
    """This engine under a KV policy, or at full depth."""
    engine = make_engine(model, chosen, batch, policy)
    prompts = make_prompts(chosen, batch)

    def run() -> int:
        found = list(engine.generate(Prompt(i, ids) for i, ids in enumerate(prompts)))
        if not all(isinstance(result, Generation) for result in found):
            raise SystemExit(f"a row failed: {found}")
        return sum(result.generated_tokens for result in found if isinstance(result, Generation))

    figures = timed(run, chosen)
    histogram = engine.stats.exit_histogram
    layers = sum(layer * count for layer, count in histogram.items())
    figures["mean_exit_layer"] = layers / histogram.total()
    judged = engine.stats.accepted_drafts.total() + engine.stats.rejected_drafts.total()
    if judged:
        figures["accepted"] = engine.stats.accepted_drafts.total() / judged
    return figures


def settings_of(num_tokens: int) -> GenerationConfig:
    """Greedy, always to the last of the new tokens."""
    return GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


def continuous(model: PreTrainedModel, chosen: argparse.Namespace, batch: int, _: str) -> Figures:
    """`transformers` continuous batching; its static batches where it fails, and why.

    Every call of it starts and ends a thread; what that takes shows in a call for one token.
    """
    model.config._attn_implementation = "sdpa"
    prompts = make_prompts(chosen, batch)
    options: dict[str, Any] = {"progress_bar": False, "persistent_manager": True}

    def run(rows: list[list[int]] = prompts, num_tokens: int = chosen.new_tokens) -> int:
        found = model.generate_batch(rows, generation_config=settings_of(num_tokens), **options)
        tokens = sum(len(result.generated_tokens) for result in found.values())
        if tokens != len(rows) * num_tokens:
            raise RuntimeError(f"{tokens} tokens of {len(rows) * num_tokens}")
        return tokens

    try:
        from transformers import ContinuousBatchingConfig

        pages = -(-(chosen.prompt_tokens + chosen.new_tokens) // 256) * len(prompts)
        small = {"page_size": 256, "num_blocks": 2 * pages, "max_batch_tokens": max(256, 8 * batch)}
        # Its own choice of pool looks for a GPU's memory, and a graph needs a GPU.
        small |= {} if chosen.device == "cuda" else {"use_cuda_graph": False}
        sizes = {} if chosen.device == "cuda" else small
        options["continuous_batching_config"] = ContinuousBatchingConfig(
            max_requests_per_batch=batch, **sizes
        )
        figures = timed(run, chosen)
        started = time.perf_counter()
        run(prompts[:1], 1)
        return {**figures, "one_token_s": time.perf_counter() - started}
    except FAILURES as error:  # the run goes on, and the table says why
        _log.warning("%s failed: %r", CONTINUOUS, error)
        reason = f"{CONTINUOUS} failed ({type(error).__name__}: {error}); static batches instead"
        return {**static(model, chosen, batch, _), "ran": STATIC, "reason": reason}
    finally:
        forget = getattr(model, "destroy_cached_continuous_batching_manager", None)
        if forget is not None:
            forget()


def static(model: PreTrainedModel, chosen: argparse.Namespace, batch: int, _: str) -> Figures:
    """`transformers` static batches; all prompts have the same length, so nothing is padded."""
    model.config._attn_implementation = "sdpa"
    prompts = make_prompts(chosen, batch)

    def run() -> int:
        tokens = 0
        for start in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[start : start + batch], device=chosen.device)
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings_of(chosen.new_tokens),
                )
            tokens += out[:, ids.shape[1] :].numel()
        return tokens

    return timed(run, chosen)


def timed(run: Callable[[], int], chosen: argparse.Namespace) -> Figures:
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
    """Tokens per second if a full-depth step took only the reading of weights and keys/values."""
    context = chosen.prompt_tokens + chosen.new_tokens / 2
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        weights -= model.model.embed_tokens.weight.nbytes  # a row per token is read
    return batch * rate / (weights + batch * context * kv_bytes(model))


def measure(model: PreTrainedModel, chosen: argparse.Namespace, rate: float) -> list[Figures]:
    """Every system at every batch, printed as they come."""
    systems = {CONTINUOUS: continuous, STATIC: static} | dict.fromkeys(POLICIES, ours)
    found = []
    for batch in chosen.batches:
        least = floor(model, chosen, batch, rate)
        for system in chosen.systems:
            figures = systems[system](model, chosen, batch, system)
            best = max(figures["tokens_per_s"])
            found.append({"batch": batch, "system": system, "floor_tokens_per_s": least, **figures})
            layer = f"{figures['mean_exit_layer']:7.2f}" if "mean_exit_layer" in figures else ""
            accepted = f"  {figures['accepted']:.1%} accepted" if "accepted" in figures else ""
            print(
                f"{batch:5}  {figures.get('ran', system):24}{best:10.1f}{best / least:10.1%}"
                f"{layer}{accepted}  {figures.get('reason', '')}".rstrip(),
                flush=True,
            )
            gc.collect()
            if chosen.device == "cuda":
                torch.cuda.empty_cache()
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--exit-layer", type=int, help="default: a third of the layers")
    parser.add_argument("--fraction", type=float, default=0.6, help="of tokens that leave there")
    parser.add_argument("--acceptance", type=float, default=0.8, help="of drafts under verify")
    systems = [CONTINUOUS, *POLICIES]
    parser.add_argument("--systems", nargs="+", default=systems, choices=[*systems, STATIC])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; allowed: cpu, with --shape tiny")
    chosen.exit_layer = chosen.exit_layer or SHAPES[chosen.shape]["num_hidden_layers"] // 3 or 1
    return chosen


def device_facts(device: str, rate: float) -> dict[str, Any]:
    """What the figures depend on, beside `machine.setup`."""
    facts: dict[str, Any] = {"device_name": machine.cpu_model(), "copy_bytes_per_s": rate}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        memory = round(found.total_memory / 2**30, 1)
        facts |= {"device_name": found.name, "device_memory_gib": memory}
        facts["cuda"] = torch.version.cuda
    else:
        facts["warning"] = CPU_WARNING
    return facts


def main() -> None:
    """Run, print, keep."""
    chosen = options()
    if chosen.device == "cpu":
        print(CPU_WARNING)
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    model = build_model(chosen.shape, chosen.device, dtype)
    facts = device_facts(chosen.device, copy_rate(chosen.device))
    print(f"{facts['device_name']}, copies at {facts['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    print(f"{'batch':>5}  {'system':24}{'tokens/s':>10}{'of floor':>10}{'layer':>7}")
    found = measure(model, chosen, facts["copy_bytes_per_s"])
    content = {"setup": machine.setup() | facts | vars(chosen), "runs": found}
    machine.write_json(chosen.out, content)


if __name__ == "__main__":
    main()
