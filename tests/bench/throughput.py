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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.systems import ENGINES, MAX_NEW_TOKENS, SYSTEMS, Outputs


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
    """What a person reads; ratios are to transformers in the same type, pair by pair."""
    head = (
        f"{'system':24}{'tok/s':>8}{'ratio':>7}{'tokens':>8}{'mean exit':>11}{'same rows':>11}"
        f"{'agree':>8}{'RSS MiB':>9}{'load s':>8}  runs"
    )
    lines = [head]
    for name, system in systems.items():
        base = systems.get(f"transformers-{SYSTEMS[name]['dtype']}", system)
        ratio = statistics.median(a / b for a, b in zip(system.rates, base.rates, strict=True))
        layer = system.runs[0].get("mean_exit_layer")
        full = full_depth_of(name, systems) or system
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


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tokens per second, side by side.")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=192, help="prompts, at most 192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated names")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(name: str, chosen: argparse.Namespace) -> System:
    """A system's process, its model loaded."""
    command = [sys.executable, "-m", "tests.bench.throughput", "--serve", name]
    for option in ("model", "limit", "threads"):
        command += [f"--{option}", str(getattr(chosen, option))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    system = System(name, process)
    system.load_s = system.read()["load_s"]
    return system


def setup(chosen: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": hardware(),
        "threads": chosen.threads,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(chosen.model).name,
        "prompts": chosen.limit,
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def figures(system: System) -> dict[str, Any]:
    """What is kept of a system's runs."""
    return {
        "setting": SYSTEMS[system.name],
        "tokens_per_s": system.rates,
        "tokens": system.tokens,
        "mean_exit_layer": system.runs[0].get("mean_exit_layer"),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in system.runs),
        "load_s": system.load_s,
    }


def main() -> None:
    """Start the systems, run the rounds, print the table."""
    chosen = options()
    if chosen.serve:
        serve(chosen.serve, chosen.model, chosen.limit, chosen.threads)
        return
    systems = {name: start(name, chosen) for name in chosen.systems.split(",")}
    for number in range(chosen.rounds):
        for system in systems.values():
            system.run()
            print(f"round {number + 1}: {system.name} {system.rates[-1]:.1f} tok/s", flush=True)
    for system in systems.values():
        system.process.communicate()
    print("\n" + " | ".join(f"{key} {value}" for key, value in setup(chosen).items()))
    print(table(systems))
    if chosen.out:
        kept = {name: figures(system) for name, system in systems.items()}
        found = {"setup": setup(chosen), "systems": kept}
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
