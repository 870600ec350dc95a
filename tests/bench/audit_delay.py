"""How many audited rows the audit needs to notice a change, and how often it warns without one.

Rows are drawn: each token differs from full depth with the same probability. Against it stands the
same bet on all rows since the job's start, which is what is sure without looking for a change.

    python -m tests.bench.audit_delay --out FILE
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eevp_batch.records import AuditCounts
from eevp_batch.tune.audited import BETS, log_returns
from eevp_batch.tune.bounds import clopper_pearson
from eevp_batch.tune.drift import ALPHA, DriftDetector
from tests.bench.machine import setup, write_json

CASES = [(bound, risk) for bound in (0.01, 0.02) for risk in (0.05, 0.2)]
LENGTHS = {"24 to 40 tokens": (24, 41), "100 to 200 tokens": (100, 201)}
SLOW_JOBS = 3
"""Those whose rows are summed, which takes thousands of them."""

Look = Callable[[AuditCounts], bool]
"""Takes the next rows in; whether they, with those before, are reason to warn."""


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good-rows", type=int, default=10_000, help="before the change")
    parser.add_argument("--at-once", type=int, default=20, help="audited rows of a commit")
    parser.add_argument("--jobs", type=int, default=10, help="with a change, for each case")
    parser.add_argument("--good-jobs", type=int, default=100, help="without one")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def commits(
    rows: int, at_once: int, risk: float, lengths: tuple[int, int], draw: np.random.Generator
) -> Iterator[AuditCounts]:
    """Audited rows of some commits."""
    for _ in range(rows // at_once):
        counts = AuditCounts()
        drawn = zip(draw.integers(*lengths, at_once), draw.geometric(risk, at_once), strict=True)
        for length, differs_at in drawn:
            if differs_at <= length:
                counts.diverged[int(differs_at) - 1, int(length)] += 1
            else:
                counts.equal[int(length)] += 1
        counts.distances[0] += at_once
        yield counts


def detector(bound: float) -> Look:
    """What a job does."""
    found = DriftDetector(bound)

    def look(counts: AuditCounts) -> bool:
        found.add(counts)
        return found.has_noticed

    return look


def sum_since_the_start(bound: float) -> Look:
    """The same bets, made once, on all rows."""
    capital = np.full(len(BETS), -math.log(len(BETS)))

    def look(counts: AuditCounts) -> bool:
        capital[:] += log_returns(counts, bound)
        return bool(np.logaddexp.reduce(capital) >= -math.log(ALPHA))

    return look


def delays(
    kind: Callable[[float], Look],
    case: dict[str, Any],
    chosen: argparse.Namespace,
    jobs: int,
    at_once: int,
) -> list[int]:
    """Sorted rows from the change to the warning; all rows there are where it does not come.

    Args:
        kind: who looks.
        case: at what.
        chosen: sizes.
        jobs: how often.
        at_once: audited rows of a commit after the change.
    """
    found = []
    for seed in range(jobs):
        draw, look = np.random.default_rng(seed), kind(case["bound"])
        lengths = LENGTHS[case["rows"]]
        for counts in commits(chosen.good_rows, chosen.at_once, case["bound"] / 2, lengths, draw):
            if look(counts):
                raise SystemExit("warned before the change: half the bound is no reason to")
        after = commits(chosen.good_rows, at_once, case["risk"], lengths, draw)
        looks = next((n for n, counts in enumerate(after, start=1) if look(counts)), None)
        found.append(chosen.good_rows if looks is None else looks * at_once)
    return sorted(found)


def false_alarms(chosen: argparse.Namespace) -> dict[str, Any]:
    """Jobs that are warned although their rows differ exactly as much as they may."""
    wrong = 0
    for seed in range(chosen.good_jobs):
        look, draw = detector(0.01), np.random.default_rng(seed)
        coming = commits(chosen.good_rows, chosen.at_once, 0.01, LENGTHS["24 to 40 tokens"], draw)
        wrong += any(look(counts) for counts in coming)
    interval = clopper_pearson(wrong, chosen.good_jobs)
    return {"jobs": chosen.good_jobs, "warned": wrong, "interval": interval, "allowed": ALPHA}


def main() -> None:
    """Print a line for each case; a sum as long as the good rows stands for at least as many."""
    chosen = options()
    cases: list[dict[str, Any]] = []
    for rows in LENGTHS:
        for bound, risk in CASES:
            case: dict[str, Any] = {"rows": rows, "bound": bound, "risk": risk}
            new = delays(detector, case, chosen, chosen.jobs, 1)
            old = delays(sum_since_the_start, case, chosen, SLOW_JOBS, chosen.at_once)
            case |= {"median": median(new), "most": new[-1], "sum_since_the_start": median(old)}
            case["ratio"] = case["sum_since_the_start"] / case["median"]
            cases.append(case)
            print(case, flush=True)
    alarms = false_alarms(chosen)
    print(alarms)
    write_json(chosen.out, {"setup": setup(), "cases": cases, "without_a_change": alarms})


if __name__ == "__main__":
    main()
