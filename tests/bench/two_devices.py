"""Two devices against one: tokens per second of the pipeline when a script says who leaves.

A device is one core of this CPU with a thread that is pinned to it. The model is cut in the middle;
with two devices each has one half. Beside the measured speed stands the ideal: each half's work,
measured where it runs alone, and a pipeline that waits for nothing but its busier device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eevp_batch.engine.devices import Device, single_cores
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine, load_weights
from eevp_batch.engine.sequence import Sequence as Generating
from eevp_batch.engine.stage import Ran, Stage
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec, VocabSpec
from tests.bench import machine
from tests.bench.prompts import chat_prompts
from tests.bench.trace import force

LEGEND = """
one, two: tokens/s on one and two devices, medians of the rounds. halves: seconds of each half's
work on one device, shallow and deep. ideal: seconds of one device to those of its busier half.
measured: two to one. share: measured to ideal. busy: share of the time that each of two devices
ran a batch. both: share of the time that both did. others: cores that other processes used, the
most of any run.
"""
HEAD = (
    f"{'f':>4}{'one':>8}{'two':>8}{'halves':>14}{'ideal':>8}{'measured':>10}{'share':>8}"
    f"{'busy':>14}{'both':>7}{'others':>8}"
)


@dataclass(frozen=True)
class Run:
    """One pass over all rows.

    Attributes:
        tokens_per_s: generated tokens by seconds.
        seconds: of the pass.
        by_depth: seconds that batches ran, by segment.
        both: seconds in which two segments ran at the same time.
        steps: batches by segment.
        foreign_cores: what else the machine was doing.
    """

    tokens_per_s: float
    seconds: float
    by_depth: list[float]
    both: float
    steps: list[int]
    foreign_cores: float


class Clock:
    """Notes when batches run on the stages of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.spans: list[tuple[int, float, float]] = []  # segment, begin, end
        for stage in engine.stages:
            self._watch(stage)

    def _watch(self, stage: Stage) -> None:
        whole = stage.run

        def timed(depth: int, sequences: Sequence[Generating]) -> Ran | None:
            begin = time.perf_counter()
            ran = whole(depth, sequences)
            self.spans.append((depth, begin, time.perf_counter()))
            return ran

        stage.run = timed  # type: ignore[method-assign]

    def by_depth(self) -> list[float]:
        """Seconds of each segment's batches."""
        return [sum(end - begin for d, begin, end in self.spans if d == depth) for depth in (0, 1)]

    def steps(self) -> list[int]:
        """Batches of each segment."""
        return [sum(d == depth for d, *_ in self.spans) for depth in (0, 1)]

    def both(self) -> float:
        """Seconds in which both segments ran."""
        marks = [(begin, 1) for _, begin, _ in self.spans] + [(end, -1) for *_, end in self.spans]
        total, running, last = 0.0, 0, 0.0
        for moment, change in sorted(marks):
            total += moment - last if running > 1 else 0.0
            running, last = running + change, moment
        return total


class Bench:
    """An engine on one device and one on two, and the rows that they run."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        spec = ModelSpec(path=chosen.model, dtype=chosen.dtype)
        config = read_model_config(spec)
        self._chosen, self._tokenizer = chosen, load_tokenizer(config, spec)
        self._weights = load_weights(spec, config)
        prompts = chat_prompts(chosen.model, min(chosen.rows, 192))
        self._prompts = [prompts[row % len(prompts)] for row in range(chosen.rows)]
        cores = single_cores(2)
        self.engines = {"one": self._built(cores[:1]), "two": self._built(cores)}
        self._clocks = {name: Clock(engine) for name, engine in self.engines.items()}

    def _built(self, devices: Sequence[Device]) -> Engine:
        chosen = self._chosen
        exits = ExitSpec(layers=[chosen.layer], kv=chosen.kv, vocab=VocabSpec(top_k=256))
        engine = build_engine(
            self._weights,
            self._tokenizer,
            exits,
            SamplingSpec(max_new_tokens=chosen.new_tokens),
            EngineSpec(max_batch=chosen.batch, max_resident=3 * chosen.batch),
            devices=devices,
        )
        force(engine, 0.5)
        list(engine.generate([Prompt(row, ids) for row, ids in enumerate(self._prompts[:8])]))
        return engine

    def run(self, name: str, fraction: float) -> Run:
        """Generate for all rows."""
        engine, clock = self.engines[name], self._clocks[name]
        force(engine, fraction)
        clock.spans.clear()
        prompts = [Prompt(row, ids) for row, ids in enumerate(self._prompts)]
        meter, started = machine.CpuMeter(os.getpid()), time.perf_counter()
        found = list(engine.generate(prompts))
        seconds = time.perf_counter() - started
        tokens = sum(len(result.exits) for result in found if isinstance(result, Generation))
        if tokens != len(prompts) * self._chosen.new_tokens:
            raise SystemExit(f"{tokens} tokens came out; some row failed")
        return Run(
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            by_depth=clock.by_depth(),
            both=clock.both(),
            steps=clock.steps(),
            foreign_cores=meter.read()["foreign_cores"],
        )


def setting(bench: Bench, fraction: float, rounds: int) -> dict[str, Any]:
    """Both engines in turn on one trace; who begins a round changes."""
    runs: dict[str, list[Run]] = {name: [] for name in bench.engines}
    for number in range(rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            runs[name].append(bench.run(name, fraction))
    one, two = runs["one"], runs["two"]
    ideal = statistics.median(run.seconds / max(run.by_depth) for run in one)
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(one, two, strict=True)]
    measured = statistics.median(ratios)
    return {
        "fraction": fraction,
        "ideal": ideal,
        "measured": measured,
        "share_of_ideal": measured / ideal,
        "both_share": statistics.median(run.both / run.seconds for run in two),
        "foreign_cores": max(run.foreign_cores for run in (*one, *two)),
        "one": [asdict(run) for run in one],
        "two": [asdict(run) for run in two],
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    one, two = row["one"][-1], row["two"][-1]
    speed = {n: statistics.median(run["tokens_per_s"] for run in row[n]) for n in ("one", "two")}
    halves = " ".join(f"{seconds:.1f}" for seconds in one["by_depth"])
    busy = " ".join(f"{seconds / two['seconds']:.0%}" for seconds in two["by_depth"])
    return (
        f"{row['fraction']:4.1f}{speed['one']:8.1f}{speed['two']:8.1f}{halves:>14}"
        f"{row['ideal']:8.3f}{row['measured']:10.3f}{row['share_of_ideal']:8.1%}{busy:>14}"
        f"{row['both_share']:7.0%}{row['foreign_cores']:8.2f}"
    )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layer", type=int, default=15, help="exit, and end of the first device")
    parser.add_argument("--kv", default="propagate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run, print, keep."""
    chosen = options()
    bench = Bench(chosen)
    print(HEAD)
    rows = []
    for fraction in chosen.fractions:
        rows.append(setting(bench, fraction, chosen.rounds))
        print(line(rows[-1]), flush=True)
    print(LEGEND)
    content = {"setup": machine.setup() | vars(chosen), "rows": rows}
    machine.write_json(chosen.out, content)


if __name__ == "__main__":
    main()
