"""What audited rows say of a job: how often its tokens differ from full depth, and how surely.

An audited row is generated twice, with the exits and at full depth. Up to its first difference both
have the same text, so that each token up to there, the differing one included, is one look at the
risk that is certified: that a token is not what full depth would give. As there, rows are the unit
and weigh the same: of row i with F_i tokens at full depth, C_i of them looked at and D_i = 1 if the
last of these differs, the *disagreement* is E[D / F] / E[C / F]. It is the certified share where a
row's tokens after its first difference differ as often as those before; where differences gather at
the beginnings of rows it is above it, by 1 / E[C / F] at most.

Its interval is by betting against a claimed disagreement R (Waudby-Smith and Ramdas, arXiv
2010.09686): if the true one is at most R, the capital prod (1 + b (D_i - R C_i) / F_i) is expected
not to grow, whatever tokens of a row have to do with each other; so it rarely gets large, for every
number of rows. `drift` bets the same on a job that is running. Knows counts, nothing of tokens,
models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eevp_batch.records import DISTANCE_STEPS, AuditCounts
from eevp_batch.tune.bounds import clopper_pearson

LEVEL = 0.95
BETS = (0.9, 1 / 2, 1 / 4, 1 / 8, 1 / 32)
"""Shares of the largest bet that cannot lose all."""
_STEPS = 40  # of a bisection

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Ratio:
    """Rows whose parts and wholes ask for E[part] / E[whole]; equal rows stand together.

    Attributes:
        parts: [n], each between 0 and its whole.
        wholes: [n], each at most 1.
        counts: [n] rows.
    """

    parts: Floats
    wholes: Floats
    counts: Floats

    @classmethod
    def of_tokens(cls, counts: AuditCounts) -> _Ratio:
        """Of a row's tokens at full depth, the share that differs and the share looked at."""
        seen = [(0.0, 1.0, counts.equal.total())]
        for (place, length), rows in sorted(counts.diverged.items()):
            longer = max(length, place + 1)
            seen.append((1 / longer, (place + 1) / longer, rows))
        parts, wholes, rows_each = np.asarray(seen, np.float64).T
        return cls(parts, wholes, rows_each)

    @classmethod
    def of_distances(cls, counts: AuditCounts) -> _Ratio:
        """Text distance of every row."""
        steps, rows = np.asarray(sorted(counts.distances.items()), np.float64).T
        return cls(steps / DISTANCE_STEPS, np.ones(len(steps)), rows)

    @property
    def estimate(self) -> float:
        return float(self.counts @ self.parts / (self.counts @ self.wholes))

    def gains_above(self, ratio: float) -> Floats:
        """[n] gains of who bets 1 that the ratio is above this one."""
        return self.parts / ratio - self.wholes

    def capital_above(self, ratio: float) -> float:
        """Log capital of who bets that the ratio is above this one, in (0, 1); falls with it."""
        return self._capital(self.gains_above(ratio))

    def capital_below(self, ratio: float) -> float:
        """Log capital of who bets that the ratio is below this one; rises with it."""
        return self._capital(ratio * self.wholes - self.parts)

    def _capital(self, gains: Floats) -> float:
        """Of bets that all begin with the same part of 1."""
        return float(np.logaddexp.reduce(self.returns(gains))) - math.log(len(BETS))

    def returns(self, gains: Floats) -> Floats:
        """[bets] logs of what each bet has become of 1; gains [n] are -1 or more."""
        logs: Floats = np.log1p(np.asarray(BETS)[:, None] * gains) @ self.counts
        return logs

    def interval(self) -> Interval:
        """The ratios that neither bet refutes."""
        enough = -math.log((1 - LEVEL) / 2)
        low, high = 0.0, 1.0
        if self.parts.any():
            low = _border(lambda ratio: self.capital_above(ratio) >= enough)[0]
        if self.capital_below(1.0) >= enough:
            high = _border(lambda ratio: self.capital_below(ratio) < enough)[1]
        return low, high


@dataclass(frozen=True, slots=True)
class AuditFigures:
    """An audit in numbers; intervals are at 95 %.

    Attributes:
        rows: audited rows.
        diverged: those that did not come out as at full depth.
        diverged_interval: of their share.
        tokens: looked at: up to the first difference, that one included.
        disagreement: share of a row's tokens that differ from full depth, given the text before.
        mean_first_divergence: 0-based position, of the rows that diverged; None without any.
        distance: mean text distance, 0..1.
    """

    rows: int
    diverged: int
    diverged_interval: Interval
    tokens: int
    disagreement: float
    disagreement_interval: Interval
    mean_first_divergence: float | None
    distance: float
    distance_interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


def audit_figures(counts: AuditCounts) -> AuditFigures | None:
    """The figures of some audited rows; None where there are none."""
    if not counts.rows:
        return None
    diverged = counts.diverged.total()
    tokens, distances = _Ratio.of_tokens(counts), _Ratio.of_distances(counts)
    positions = sum(place * rows for (place, _), rows in counts.diverged.items())
    equal = sum(length * rows for length, rows in counts.equal.items())
    return AuditFigures(
        rows=counts.rows,
        diverged=diverged,
        diverged_interval=clopper_pearson(diverged, counts.rows, LEVEL),
        tokens=equal + positions + diverged,
        disagreement=tokens.estimate,
        disagreement_interval=tokens.interval(),
        mean_first_divergence=positions / diverged if diverged else None,
        distance=distances.estimate,
        distance_interval=distances.interval(),
    )


def log_returns(counts: AuditCounts, bound: float) -> Floats:
    """What 1 becomes of each of `BETS` on a disagreement above a bound, [bets] in logarithms.

    Args:
        counts: audited rows, at least one.
        bound: in (0, 1).
    """
    rows = _Ratio.of_tokens(counts)
    return rows.returns(rows.gains_above(bound))


def _border(holds: Callable[[float], bool]) -> Interval:
    """Two close numbers in (0, 1), of which `holds` is true of the first and not of the second."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
