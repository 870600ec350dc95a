"""Damaged and hostile inputs to everything that reads what others wrote.

Every case ends in a result or in one of our own errors; any other exception ends the command, with
the smallest case that shows it. Each target runs in a process of its own. Prints what became of the
cases, and the CPU time and memory that they took.

Usage: python -m tests.nightly.fuzz [--cases 100000] [--seed 0] [--only NAME] [--jobs 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

from eevp_batch.errors import EevpError
from tests.nightly.targets import Target, all_targets

_PER_ROUND = 2000  # hypothesis remembers the cases of a round
MAX_MEMORY_BYTES = 12 << 30
"""Of address space; what is really used is printed."""


class Tried(NamedTuple):
    """What became of a target's cases."""

    outcomes: Counter[str]
    cpu_s: float
    peak_bytes: int


def fuzz(target: Target, num_cases: int, first_seed: int) -> Counter[str]:
    """Try cases of one target.

    Args:
        target: what to fuzz.
        num_cases: how many.
        first_seed: draws them.

    Returns:
        How many ended in what: a word of the target, or the class of one of our errors.
    """
    outcomes: Counter[str] = Counter()
    for start in range(0, num_cases, _PER_ROUND):
        _round(target, min(_PER_ROUND, num_cases - start), first_seed + start, outcomes)
    return outcomes


def _round(target: Target, num_cases: int, round_seed: int, outcomes: Counter[str]) -> None:
    @seed(round_seed)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def one(case: Any) -> None:
        try:
            outcomes[target.check(case)] += 1
        except EevpError as error:
            outcomes[type(error).__name__] += 1

    one()


def _try(name: str, num_cases: int, first_seed: int) -> Tried:
    """Fuzz one target, in a process that does nothing else."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    (target,) = (target for target in all_targets() if target.name == name)
    start_s = time.process_time()
    outcomes = fuzz(target, num_cases, first_seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Tried(outcomes, time.process_time() - start_s, peak)


def main() -> None:
    """Fuzz every target, each with its share of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a target's name")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    options = parser.parse_args()
    weights = {t.name: t.weight for t in all_targets() if options.only in t.name}
    shares = {n: -(-options.cases * w // sum(weights.values())) for n, w in weights.items()}
    context = multiprocessing.get_context("spawn")
    total = 0
    print("| read | cases | CPU seconds | peak memory, MiB | what they gave |")
    print("|---|---|---|---|---|")
    with ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=1) as pool:
        running = {n: pool.submit(_try, n, share, options.seed) for n, share in shares.items()}
        for name, future in running.items():
            found = future.result()
            gave = ", ".join(f"{word} {count:,}" for word, count in found.outcomes.most_common())
            num, peak_mib = found.outcomes.total(), found.peak_bytes >> 20
            print(f"| {name} | {num:,} | {found.cpu_s:.0f} | {peak_mib:,} | {gave} |", flush=True)
            total += num
    print(f"\n{total:,} cases, seed {options.seed}: each gave a result or our own error")


if __name__ == "__main__":
    main()
