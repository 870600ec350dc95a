"""Damaged and hostile inputs to everything that reads what others wrote.

Every case ends in a result or in one of our own errors; any other exception ends the command, with
the smallest case that shows it. Prints what became of the cases, and the memory that they took.

Usage: python -m tests.nightly.fuzz [--cases 100000] [--seed 0] [--only NAME]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from eevp_batch.errors import EevpError
from tests.nightly.targets import Target, all_targets

_PER_ROUND = 2000  # hypothesis remembers the cases of a round
MAX_MEMORY_BYTES = 12 << 30
"""Of address space; what is really used is printed."""


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


def main() -> None:
    """Fuzz every target, each with its share of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a target's name")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    targets = [target for target in all_targets() if options.only in target.name]
    total = Counter[str]()
    print(
        "| read | cases | CPU seconds | peak memory, MiB | what they gave |\n|---|---|---|---|---|"
    )
    for target in targets:
        share = -(-options.cases * target.weight // sum(each.weight for each in targets))
        start_s = time.process_time()
        outcomes = fuzz(target, share, options.seed)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        gave = ", ".join(f"{name} {count:,}" for name, count in outcomes.most_common())
        seconds = time.process_time() - start_s
        num = outcomes.total()
        print(f"| {target.name} | {num:,} | {seconds:.0f} | {peak_mib:,} | {gave} |", flush=True)
        total.update({target.name: num})
    print(f"\n{total.total():,} cases, seed {options.seed}: each gave a result or our own error")


if __name__ == "__main__":
    main()
