"""Whether certified settings keep their promise, on losses whose true risk is known.

    python -m tests.bench.guarantee --repetitions 2000 --rows 1000 --delta 0.01 --epsilon 0.05

Every repetition draws calibration rows anew, certifies along a path of settings, and looks up the
true risk of what was certified. The last two ways of certifying are what one would do without a
guarantee; they are here to show that these worlds can tell.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eevp_batch.tune.bounds import Floats, clopper_pearson, p_value
from eevp_batch.tune.certify import fixed_sequence
from tests.bench.machine import write_json

Draw = Callable[[np.random.Generator, float, int], Floats]
Certifier = Callable[[Floats, float, float], float]


def zero_or_one(rng: np.random.Generator, risk: float, num_rows: int) -> Floats:
    """A row is wrong or right."""
    return (rng.random(num_rows) < risk).astype(np.float64)


def token_shares(rng: np.random.Generator, risk: float, num_rows: int) -> Floats:
    """Shares of 64 tokens; rows differ in how hard they are."""
    if risk == 0:
        return np.zeros(num_rows)
    return rng.binomial(64, rng.beta(0.5, 0.5 / risk - 0.5, num_rows)) / 64


def steady(rng: np.random.Generator, risk: float, num_rows: int) -> Floats:
    """All rows are about equally wrong."""
    return rng.uniform(0, 2 * risk, num_rows)


def catastrophes(share: float) -> Draw:
    """So large a share of the risk comes from rows that are wholly wrong, the rest is constant."""

    def draw(rng: np.random.Generator, risk: float, num_rows: int) -> Floats:
        base = (1 - share) * risk
        chance = share * risk / (1 - base)
        return np.where(rng.random(num_rows) < chance, 1.0, base)

    return draw


WORLDS: dict[str, Draw] = {
    "zero or one": zero_or_one,
    "token shares": token_shares,
    "steady": steady,
    "bad rows": catastrophes(0.5),
    "rare bad rows": catastrophes(0.05),
}

# True risks from conservative to bold, in units of delta.
PATHS: dict[str, list[float]] = {
    "gradual": [0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.01, 1.05, 1.2],
    "cliff": [0.0, 1.001, 1.001, 1.001, 2.0],
}


def by_mean(losses: Floats, delta: float, epsilon: float) -> float:
    """No test at all: passes where the observed risk is at most delta."""
    return 0.0 if losses.mean() <= delta else 1.0


def by_normal(losses: Floats, delta: float, epsilon: float) -> float:
    """The usual z-test, which believes the observed variance."""
    deviation = float(losses.std(ddof=1)) / len(losses) ** 0.5
    gap = float(losses.mean()) - delta
    return statistics.NormalDist(0, deviation).cdf(gap) if deviation else float(gap > 0)


CERTIFIERS: dict[str, Certifier] = {
    "hoeffding_bentkus": lambda rows, delta, epsilon: p_value(
        "hoeffding_bentkus", rows, delta, epsilon=epsilon, seed=0
    ),
    "betting": lambda rows, delta, epsilon: p_value(
        "betting", rows, delta, epsilon=epsilon, seed=0
    ),
    "mean, no test": by_mean,
    "normal": by_normal,
}


@dataclass(frozen=True)
class Setup:
    """How a calibration is made; `seed` fixes all repetitions."""

    delta: float
    epsilon: float
    num_rows: int
    repetitions: int
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of many calibrations.

    Attributes:
        violations: how often the certified setting's true risk was above delta.
        mean_risk: true risk of what was certified, in units of delta, full depth counting as 0.
    """

    violations: int
    repetitions: int
    mean_risk: float

    @property
    def share(self) -> float:
        return self.violations / self.repetitions

    @property
    def interval(self) -> tuple[float, float]:
        return clopper_pearson(self.violations, self.repetitions)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:6.1%} [{low:5.1%}, {high:5.1%}]  risk {self.mean_risk:4.2f} delta"


def simulate(
    draw: Draw, path: Sequence[float], setup: Setup, certifiers: Sequence[str]
) -> dict[str, Outcome]:
    """The outcome of each way of certifying, all on the same rows."""
    risks: dict[str, list[float]] = {name: [] for name in certifiers}
    rng = np.random.default_rng(setup.seed)
    for _ in range(setup.repetitions):
        rows = [draw(rng, risk * setup.delta, setup.num_rows) for risk in path]
        for name in certifiers:
            values = (CERTIFIERS[name](losses, setup.delta, setup.epsilon) for losses in rows)
            index = fixed_sequence(values, setup.epsilon)
            risks[name].append(0.0 if index is None else path[index])
    return {
        name: Outcome(sum(risk > 1 for risk in found), len(found), statistics.fmean(found))
        for name, found in risks.items()
    }


def table(setup: Setup, certifiers: Sequence[str]) -> Iterator[tuple[str, str, str, Outcome]]:
    """World, path, way of certifying and outcome."""
    for world, draw in WORLDS.items():
        for path, risks in PATHS.items():
            for name, outcome in simulate(draw, risks, setup, certifiers).items():
                yield world, path, name, outcome


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    chosen = parser.parse_args()
    setup = Setup(chosen.delta, chosen.epsilon, chosen.rows, chosen.repetitions, chosen.seed)
    print(f"{setup}\nviolations of delta [95 % interval], allowed: {setup.epsilon:.1%}")
    figures = []
    for world, path, name, outcome in table(setup, list(CERTIFIERS)):
        print(f"{world:14} {path:8} {name:18} {outcome}", flush=True)
        figures.append({"world": world, "path": path, "certifier": name, **vars(outcome)})
    if chosen.out:
        write_json(chosen.out, {"setup": vars(setup), "outcomes": figures})


if __name__ == "__main__":
    main()
