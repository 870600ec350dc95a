"""Tokens per second on one workload, side by side with transformers' static `generate`.

    python -m tests.bench.throughput --model models/smollm2-135m-instruct --out results.json

Every system lives in a process of its own, which loads its model once; the rounds then go through
the systems in turn (A B C D, A B C D, ...), so that a machine that slows down slows all of them.
Reported are generated tokens (end tokens included) per second of the whole batch, prefill included,
loading and a warm-up of four prompts excluded.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 128
SYSTEMS = {
    "transformers-float32": {"engine": "transformers", "dtype": "float32", "batch": 32},
    "transformers-bfloat16": {"engine": "transformers", "dtype": "bfloat16", "batch": 64},
    "eevp-float32-off": {"engine": "eevp", "dtype": "float32", "batch": 64},
    "eevp-bfloat16-off": {"engine": "eevp", "dtype": "bfloat16", "batch": 64},
    "eevp-bfloat16-on": {
        "engine": "eevp",
        "dtype": "bfloat16",
        "batch": 64,
        "layers": [20, 25],
        "threshold": 0.9,
    },
}  # fmt: skip
Outputs = list[list[int]]


# ---------------------------------------------------------------- the systems, each in a process


def transformers_static(model_path: str, prompts: list[list[int]], setting: dict[str, Any]) -> Any:
    """Length-sorted, left-padded batches, as a careful user of `generate` would run them."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, setting["dtype"])
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    end = model.generation_config.eos_token_id

    @torch.inference_mode()
    def generate(count: int) -> tuple[Outputs, dict[str, Any]]:
        order = sorted(range(count), key=lambda i: len(prompts[i]))
        outputs: Outputs = [[] for _ in range(count)]
        for start in range(0, count, setting["batch"]):
            rows = order[start : start + setting["batch"]]
            width = max(len(prompts[i]) for i in rows)
            padding = [width - len(prompts[i]) for i in rows]
            ids = torch.tensor([[end] * n + prompts[i] for n, i in zip(padding, rows, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=end,
            )
            for i, row in zip(rows, out[:, width:].tolist(), strict=True):
                outputs[i] = row[: row.index(end) + 1] if end in row else row
        return outputs, {}

    return generate


def eevp(model_path: str, prompts: list[list[int]], setting: dict[str, Any]) -> Any:
    """Our engine; `layers` turns exits on."""
    from eevp_batch.engine.load import build_engine, load_weights
    from eevp_batch.engine.tokenizer import load_tokenizer
    from eevp_batch.model_config import read_model_config
    from eevp_batch.records import Generation, Prompt
    from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec

    spec = ModelSpec(path=model_path, dtype=setting["dtype"])
    config = read_model_config(spec)
    exits = ExitSpec(mode="off")
    if "layers" in setting:
        exits = ExitSpec(layers=setting["layers"], threshold=setting["threshold"])
    engine = build_engine(
        load_weights(spec, config),
        load_tokenizer(config, spec),
        exits,
        SamplingSpec(max_new_tokens=MAX_NEW_TOKENS),
        EngineSpec(max_batch=setting["batch"]),
    )

    def generate(count: int) -> tuple[Outputs, dict[str, Any]]:
        outputs: Outputs = [[] for _ in range(count)]
        layers = 0
        for result in engine.generate(Prompt(i, prompts[i]) for i in range(count)):
            if not isinstance(result, Generation):
                raise SystemExit(f"row {result.row_id} failed: {result.message}")
            outputs[int(result.row_id)] = result.token_ids
            layers += sum(result.exit_layers)
        return outputs, {"mean_exit_layer": layers / sum(map(len, outputs))}

    return generate


ENGINES: dict[str, Callable[..., Any]] = {"transformers": transformers_static, "eevp": eevp}


def serve(name: str, model_path: str, limit: int, threads: int) -> None:
    """A system's process: load, warm up, then one timed run per line of standard input."""
    import torch
    from transformers import AutoTokenizer

    from tests.bench.prompts import throughput_prompts

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = []
    for text in throughput_prompts()[:limit]:
        message = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    setting = SYSTEMS[name]
    started = time.perf_counter()
    generate = ENGINES[setting["engine"]](model_path, prompts, setting)
    loaded = time.perf_counter() - started
    generate(min(4, len(prompts)))
    print(json.dumps({"load_s": loaded}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        outputs, extra = generate(len(prompts))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        run = {"seconds": seconds, "outputs": outputs, "peak_rss_bytes": peak, **extra}
        print(json.dumps(run), flush=True)


# ------------------------------------------------------------------------------ the comparison


@dataclass
class System:
    """One system's process and what it measured."""

    name: str
    process: subprocess.Popen[str]
    load_s: float = 0.0
    runs: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended early; its messages are above")
        return dict(json.loads(line))

    def run(self) -> None:
        if self.process.stdin is None:
            raise SystemExit(f"{self.name} cannot be spoken to")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.runs.append(self.read())

    @property
    def outputs(self) -> Outputs:
        return self.runs[0]["outputs"]  # type: ignore[no-any-return]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def rates(self) -> list[float]:
        return [sum(map(len, run["outputs"])) / run["seconds"] for run in self.runs]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def agreement(outputs: Outputs, reference: Outputs) -> tuple[int, float]:
    """Rows that are identical, and the share of tokens before a row's first difference."""
    identical = before = total = 0
    for ours, theirs in zip(outputs, reference, strict=True):
        identical += ours == theirs
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        before += first
        total += max(len(ours), len(theirs))
    return identical, before / total


def full_depth_of(name: str, systems: dict[str, System]) -> System | None:
    """The system that runs the same engine and type at full depth."""
    return systems.get(name.removesuffix("-on") + "-off" if name.endswith("-on") else name)


def table(systems: dict[str, System]) -> str:
    """What a person reads; ratios are to the first system, pair by pair."""
    first = next(iter(systems.values()))
    head = (
        f"{'system':24}{'tok/s':>8}{'ratio':>7}{'tokens':>8}{'mean exit':>11}{'same rows':>11}"
        f"{'agree':>8}{'RSS MiB':>9}{'load s':>8}  runs"
    )
    lines = [head]
    for name, system in systems.items():
        ratio = statistics.median(
            mine / base for mine, base in zip(system.rates, first.rates, strict=True)
        )
        layer = system.runs[0].get("mean_exit_layer")
        full = full_depth_of(name, systems) or first
        identical, share = agreement(system.outputs, full.outputs)
        peak = max(run["peak_rss_bytes"] for run in system.runs) / 2**20
        lines.append(
            f"{name:24}{system.rate:8.1f}{ratio:7.2f}{system.tokens:8}"
            f"{'-' if layer is None else f'{layer:.2f}':>11}{identical:>11}{share:8.3f}"
            f"{peak:9.0f}{system.load_s:8.1f}  {', '.join(f'{rate:.1f}' for rate in system.rates)}"
        )
    lines.append(
        "same rows, agree: against the same engine and type at full depth; agree is the share of "
        "tokens before a row's first difference."
    )
    return "\n".join(lines)


def hardware() -> str:
    """CPU model as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Start the systems, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=192, help="prompts, at most 192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated names")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options.limit, options.threads)
        return
    systems: dict[str, System] = {}
    for name in options.systems.split(","):
        command = [sys.executable, "-m", "tests.bench.throughput", "--serve", name]
        command += ["--model", options.model, "--limit", str(options.limit)]
        command += ["--threads", str(options.threads)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        systems[name] = System(name, process)
        systems[name].load_s = systems[name].read()["load_s"]
    for number in range(options.rounds):
        for system in systems.values():
            system.run()
            print(f"round {number + 1}: {system.name} {system.rates[-1]:.1f} tok/s", flush=True)
    for system in systems.values():
        system.process.communicate()
    import torch
    import transformers

    setup = {
        "cpu": hardware(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "prompts": options.limit,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    print("\n" + " | ".join(f"{key} {value}" for key, value in setup.items()))
    print(table(systems))
    if options.out:
        figures = {
            name: {
                "setting": SYSTEMS[name],
                "tokens_per_s": system.rates,
                "tokens": system.tokens,
                "mean_exit_layer": system.runs[0].get("mean_exit_layer"),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in system.runs),
                "load_s": system.load_s,
            }
            for name, system in systems.items()
        }
        options.out.write_text(json.dumps({"setup": setup, "systems": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
