"""Where a decode step's time goes, part by part, beside the least that each part could take.

    python -m tests.bench.step_profile --batch 192 --context 100

The floor of a matrix product is its multiply-adds at the best rate that this machine reaches on it
(measured here, 1,024 rows), that of attention the bytes of keys and values at the rate at which
this machine reads memory, that of everything else nothing. CPU kernels only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eevp_batch.engine import exits as exits_module
from eevp_batch.engine import stage as stage_module
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fused import FusedLayers, PackedLinear
from eevp_batch.engine.load import load
from eevp_batch.records import Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec
from tests.bench import machine

BEST_ROWS = 1024
REASONS = {
    "gate_up": "product with all MLP weights; fewer rows than the best rate needs, output written",
    "down": "as gate_up; 1,536 deep, so that partial sums stay longer in registers",
    "qkv": "product; its narrow output gives each core few blocks",
    "out": "product; the narrowest of all",
    "head": "product; writes B x 49,152 scores, 19 MB at 192 rows",
    "attention": "reads every key and value once, in 2 KiB pieces that lie anywhere",
    "scores read": "log-sum-exp, two best, first argmax: each score once from memory",
    "norm": "two passes over B x 576 float32 per layer, and a thread barrier",
    "silu": "one exp per MLP element",
    "record": "Python: one token appended per sequence",
    "pack": "Python: positions and slots of each sequence",
}


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of `owner.name`."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments, **options)
            self.seconds[part] += time.perf_counter() - started
            return found

        setattr(owner, name, timed)


def watch_all(engine: Engine) -> Clock:
    """Put a clock around the parts of a step."""
    clock, layers = Clock(), engine._model.layers
    if not isinstance(layers, FusedLayers):
        raise SystemExit("the CPU kernels are not in use here, see the log")
    for layer in layers._layers.values():
        for name in ("qkv", "out", "gate_up", "down"):
            clock.watch(layer, name, name)
    clock.watch(layers, "_head", "head")
    clock.watch(layers, "_call", "attention")
    clock.watch(layers, "_norm", "norm")
    clock.watch(layers, "_silu_mul", "silu")
    clock.watch(exits_module, "summarise", "scores read")
    clock.watch(stage_module, "pack", "pack")
    clock.watch(engine._results, "record", "record")
    clock.watch(engine, "step", "step")
    return clock


def best_rate(out_width: int, in_width: int, dtype: torch.dtype) -> float:
    """FLOP/s of the product with a weight [out, in], the best of several tries."""
    product = PackedLinear(torch.randn(out_width, in_width).to(dtype))
    rows = torch.randn(BEST_ROWS if out_width < 10_000 else 192, in_width).to(dtype)
    best = 0.0
    for _ in range(12):
        started = time.perf_counter()
        product(rows)
        rate = 2 * len(rows) * out_width * in_width / (time.perf_counter() - started)
        best = max(best, rate)
    return best


def read_rate() -> float:
    """Bytes per second at which memory is read."""
    memory = torch.ones(64 << 20)  # 256 MiB
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        memory.sum()
        best = max(best, memory.nbytes / (time.perf_counter() - started))
    return best


def floors(engine: Engine, batch: int, context: float) -> dict[str, float]:
    """Least seconds of the parts of a step."""
    model, config = engine._model, engine._model.config
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    shapes = {
        "qkv": (q + 2 * kv, width),
        "out": (width, q),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
        "head": (model.vocab_size, width),
    }
    found = {}
    for name, shape in shapes.items():
        times = 1 if name == "head" else model.num_layers
        flops = 2 * batch * shape[0] * shape[1] * times
        found[name] = flops / best_rate(*shape, model.dtype)
    read = 2 * kv * model.dtype.itemsize * model.num_layers * batch * context
    return found | {"attention": read / read_rate()}


@torch.inference_mode()
def profile(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time `steps` decode steps of a full batch."""
    spare = 8
    engine = load(
        chosen.model,
        ExitSpec(mode="off"),
        SamplingSpec(max_new_tokens=chosen.steps + 2 * spare + 200),
        EngineSpec(max_batch=chosen.batch, max_resident=chosen.batch, prefix_sharing=False),
        dtype=chosen.dtype,
    )
    engine._results.end_ids = frozenset()
    first = max(1, chosen.context - chosen.steps // 2)
    ids = min(1000, engine.model.vocab_size - 5)
    for row in range(chosen.batch):
        engine.add(Prompt(row, [5 + (row + i) % ids for i in range(first)]))
    while engine.pool.num_free_seats:
        engine.step()
    for _ in range(spare):
        engine.step()
    clock = watch_all(engine)
    contexts = []
    for _ in range(chosen.steps):
        contexts.append(sum(s.front + 1 for _, s in engine.queues._queues[0]) / chosen.batch)
        engine.step()
    context = sum(contexts) / len(contexts)
    least = floors(engine, chosen.batch, context)
    per_step = {part: total / chosen.steps for part, total in clock.seconds.items()}
    whole = per_step.pop("step")
    per_step["else"] = whole - sum(per_step.values())
    parts = sorted(per_step, key=lambda part: -per_step[part])
    table = [
        {
            "part": part,
            "ms": 1e3 * per_step[part],
            "share": per_step[part] / whole,
            "floor_ms": 1e3 * least.get(part, 0.0),
            "reason": REASONS.get(part, "Python and small operations between the parts"),
        }
        for part in parts
    ]
    return {
        "step_ms": 1e3 * whole,
        "floor_ms": 1e3 * sum(least.values()),
        "context": context,
        "parts": table,
    }


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--context", type=int, default=100, help="tokens per sequence, about")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found = profile(chosen)
    print(f"{'part':12}{'ms':>8}{'share':>8}{'floor ms':>10}  what keeps it from the floor")
    for row in found["parts"]:
        print(
            f"{row['part']:12}{row['ms']:8.2f}{row['share']:8.1%}{row['floor_ms']:10.2f}  "
            f"{row['reason']}"
        )
    rate, best = chosen.batch / found["step_ms"], chosen.batch / found["floor_ms"]
    print(
        f"step {found['step_ms']:.1f} ms ({1e3 * rate:.0f} tokens/s), floor "
        f"{found['floor_ms']:.1f} ms ({1e3 * best:.0f} tokens/s), {chosen.batch} sequences of "
        f"{found['context']:.0f} tokens"
    )
    if chosen.out:
        text = json.dumps({"setup": machine.setup() | vars(chosen)} | found, indent=1)
        Path(chosen.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
