"""Damaged and hostile inputs to everything that reads what others wrote.

Every case ends in a result or in one of our own errors; any other exception ends the command, with
the smallest case that shows it. Each target runs in a process of its own. Prints what became of the
cases, and the CPU time and memory that they took.

With `--state` this may be done a few minutes at a time: the file keeps what became of each round of
cases, the same command goes on with those that are missing, and the table counts all of them.

Usage: python -m tests.nightly.fuzz [--cases 100000] [--seed 0] [--only NAME] [--jobs 2]
           [--state fuzz.jsonl [--seconds 300]]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

from eevp_batch.errors import EevpError
from tests.nightly.pieces import Pieces, add_arguments, pieces_of
from tests.nightly.targets import READERS, Target

_PER_ROUND = 500  # hypothesis remembers the cases of a round
MAX_MEMORY_BYTES = 12 << 30
"""Of address space; what is really used is printed."""


class Round(NamedTuple):
    """Some cases of one target, drawn by one seed."""

    target: str
    seed: int
    cases: int

    def __str__(self) -> str:
        return f"{self.target}, {self.cases} cases, seed {self.seed}"


class Tried(NamedTuple):
    """What became of a round.

    Attributes:
        outcomes: how many ended in what: a word of the target, or the class of one of our errors.
        peak_bytes: the most that the target's process had used by then.
    """

    outcomes: dict[str, int]
    cpu_s: float
    peak_bytes: int


def fuzz(target: Target, num_cases: int, round_seed: int) -> Counter[str]:
    """Try so many cases of one target; how many ended in what."""
    outcomes: Counter[str] = Counter()

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
    return outcomes


def _rounds(cases: int, first_seed: int, only: str) -> list[Round]:
    """All that there is to try: each target with its share of the cases."""
    weights = {name: reader.weight for name, reader in READERS.items() if only in name}
    rounds = []
    for name, weight in weights.items():
        share = -(-cases * weight // sum(weights.values()))
        for start in range(0, share, _PER_ROUND):
            rounds.append(Round(name, first_seed + start, min(_PER_ROUND, share - start)))
    return rounds


def _try(rounds: Sequence[Round], pieces: Pieces, until_s: float) -> None:
    """Try rounds of one target until it is so late, in a process that does nothing else."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    target = None
    for one in rounds:
        if time.time() >= until_s:
            break
        target = target or READERS[one.target].make()
        start_s = time.process_time()
        outcomes = fuzz(target, one.cases, one.seed)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        tried = Tried(outcomes, round(time.process_time() - start_s, 2), peak_bytes)
        pieces.keep(str(one), tried._asdict())


def _go_on(rounds: Sequence[Round], pieces: Pieces, jobs: int, seconds: float) -> None:
    """Try those rounds of which nothing is known yet, until the time is over."""
    known = pieces.found()
    missing = [one for one in rounds if str(one) not in known]
    context = multiprocessing.get_context("spawn")
    until_s = time.time() + seconds
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        running = [
            pool.submit(_try, [one for one in missing if one.target == name], pieces, until_s)
            for name in dict.fromkeys(one.target for one in missing)
        ]
        for future in running:
            future.result()


def _print_table(found: Mapping[Round, Tried]) -> None:
    print("| read | cases | CPU seconds | peak memory, MiB | what they gave |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(one.target for one in found):
        of_it = [tried for one, tried in found.items() if one.target == name]
        outcomes = sum((Counter(tried.outcomes) for tried in of_it), Counter[str]())
        gave = ", ".join(f"{word} {count:,}" for word, count in outcomes.most_common())
        cpu_s = sum(tried.cpu_s for tried in of_it)
        peak_mib = max(tried.peak_bytes for tried in of_it) >> 20
        print(f"| {name} | {outcomes.total():,} | {cpu_s:.0f} | {peak_mib:,} | {gave} |")


def main() -> None:
    """Fuzz every target, each with its share of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a target's name")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    add_arguments(parser)
    options = parser.parse_args()
    rounds = _rounds(options.cases, options.seed, options.only)
    with pieces_of(options) as pieces:
        _go_on(rounds, pieces, options.jobs, options.seconds)
        kept = pieces.found()
    found = {one: Tried(**kept[str(one)]) for one in rounds if str(one) in kept}
    _print_table(found)
    num = sum(sum(tried.outcomes.values()) for tried in found.values())
    print(f"\n{num:,} cases, seed {options.seed}: each gave a result or our own error")
    if len(found) < len(rounds):
        sys.exit(f"{len(rounds) - len(found)} of {len(rounds)} rounds are left")


if __name__ == "__main__":
    main()
