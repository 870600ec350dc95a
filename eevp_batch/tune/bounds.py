"""What can be said about a mean risk after n rows: p-values, rows needed, confidence intervals.

A row (one generation) is the unit: tokens of a row are not independent, rows are. Everything here
holds for every distribution on [0, 1] and every number of rows; nothing is asymptotic. Knows
numbers, nothing of models, thresholds or files.

Sources: Hoeffding-Bentkus: Bates et al., "Distribution-Free, Risk-Controlling Prediction Sets"
(arXiv 2101.02703) and Angelopoulos et al., "Learn then Test" (arXiv 2110.01052), whose p-value it
is. Betting: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
(arXiv 2010.09686), as arXiv 2101.02703 uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind

Floats = npt.NDArray[np.float64]
Losses = Sequence[float] | Floats

# Shares of the capital: half on a bet that adapts to the rows, half on bets that stay.
_ADAPTIVE_SHARE = 0.5
_FIXED_BETS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_FIXED_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32)
_MOST_ROWS_SUMMED = 10**7  # beyond them Hoeffding's bound is estimate enough


def p_value(kind: PValueKind, losses: Losses, delta: float, *, epsilon: float, seed: int) -> float:
    """The p-value of this kind against H0: E[loss] > delta, see the function of that name."""
    if kind == "hoeffding_bentkus":
        return hoeffding_bentkus(losses, delta)
    return betting(losses, delta, epsilon=epsilon, seed=seed)


def hoeffding_bentkus(losses: Losses, delta: float) -> float:
    """P-value of H0: E[loss] > delta from the mean loss alone.

    With R the mean of n losses: min(exp(-n h(min(R, delta), delta)), e P(Bin(n, delta) <= ceil(n
    R))), h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)). Nearly exact for losses that are
    0 or 1; wasteful for losses of small variance, where `betting` needs a fraction of the rows.

    Args:
        losses: [n], independent, identically distributed, each in [0, 1].
        delta: bound on the mean, in (0, 1).

    Raises:
        CalibrationError: a loss or delta is out of range, or there is no loss.
    """
    values = _checked(losses)
    _check_share("delta", delta)
    return _hoeffding_bentkus(math.fsum(values.tolist()), len(values), delta)


def betting(losses: Losses, delta: float, *, epsilon: float, seed: int) -> float:
    """P-value of H0: E[loss] > delta from the capital of a gambler against it.

    Under H0 the capital prod_i (1 - nu_i (loss_i - delta)) is a supermartingale for bets nu_i in
    [0, 1] that depend on earlier rows only; so is a fixed mixture of such capitals, and by Ville's
    inequality 1 / (its largest value) is a p-value. Half of the capital bets as arXiv 2101.02703
    does, nu_i = min(1, sqrt(2 log(1 / epsilon) / (n sigma_{i-1}^2))); that is slow to recover from
    a rare bad row, so the other half hedges with bets of fixed size.

    Args:
        losses: [n], independent, identically distributed, each in [0, 1].
        delta: bound on the mean, in (0, 1).
        epsilon: level that the test aims at, in (0, 1); the p-value is valid at every level.
        seed: fixes the order in which rows are bet on; choose it before the losses are seen, for
            trying several would choose among several p-values.

    Raises:
        CalibrationError: a loss, delta or epsilon is out of range, or there is no loss.
    """
    values = _checked(losses)
    _check_share("delta", delta)
    _check_share("epsilon", epsilon)
    values = values[np.random.default_rng(seed).permutation(len(values))]
    edge = values - delta
    adaptive = np.cumsum(np.log1p(-_adaptive_bets(values, epsilon) * edge))
    capital = np.logaddexp(
        math.log(_ADAPTIVE_SHARE) + adaptive, math.log1p(-_ADAPTIVE_SHARE) + _fixed_capital(edge)
    )
    return min(1.0, math.exp(-float(capital.max())))


def rows_needed(delta: float, epsilon: float, expected_risk: float) -> int | None:
    """How many rows `hoeffding_bentkus` needs to get to epsilon if the mean loss is as expected.

    An estimate: a few rows fewer may do where ceil(n R) is kind, and the observed mean is above the
    expected one half of the time. None where no number of rows is enough.

    Raises:
        CalibrationError: an argument is out of range.
    """
    _check_share("delta", delta)
    _check_share("epsilon", epsilon)
    if not 0 <= expected_risk <= 1:
        raise CalibrationError(f"expected risk: found {expected_risk}; allowed: 0 to 1")
    divergence = _divergence(expected_risk, delta) if expected_risk < delta else 0.0
    if divergence <= 0:
        return None
    by_hoeffding = math.ceil(-math.log(epsilon) / divergence)
    if expected_risk == 0 or by_hoeffding > _MOST_ROWS_SUMMED:
        return by_hoeffding

    def passes(num_bad: int, num_rows: int) -> bool:
        return math.e * binomial_cdf(num_bad, num_rows, delta) <= epsilon

    def most_rows(num_bad: int) -> int:
        return math.floor(num_bad / expected_risk + 1e-9)

    last = math.ceil(by_hoeffding * expected_risk)
    num_bad = _first(lambda bad: passes(bad, most_rows(bad)), 1, last)
    if num_bad == last:
        return by_hoeffding
    fewest = most_rows(num_bad - 1) + 1
    return min(by_hoeffding, _first(lambda rows: passes(num_bad, rows), fewest, most_rows(num_bad)))


def rows_needed_by_betting(losses: Losses, delta: float, epsilon: float) -> int | None:
    """About how many rows `betting` needs if they are like these, say those of a tuning split.

    The capital of the best fixed bet grows by its mean log return per row. None where none grows.

    Raises:
        CalibrationError: an argument is out of range, or there is no loss.
    """
    edge = _checked(losses) - delta
    _check_share("delta", delta)
    _check_share("epsilon", epsilon)
    wanted = [
        -math.log(epsilon * share * (1 - _ADAPTIVE_SHARE)) / growth
        for bet, share in zip(_FIXED_BETS, _FIXED_SHARES, strict=True)
        if (growth := float(np.log1p(-bet * edge).mean())) > 0
    ]
    return math.ceil(min(wanted)) if wanted else None


def least_rows(kind: PValueKind, delta: float, epsilon: float, seed: int = 0) -> int:
    """The fewest rows that certify settings under which no row loses anything."""

    def passes(count: int) -> bool:
        return p_value(kind, [0.0] * count, delta, epsilon=epsilon, seed=seed) <= epsilon

    high = 1
    while not passes(high):
        high *= 2
    return _first(passes, high // 2 + 1, high)


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(Bin(trials, probability) <= successes), summed term by term in logarithms."""
    if successes < 0:
        return 0.0
    if successes >= trials or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    done = np.arange(successes, dtype=np.float64)
    steps = np.log((trials - done) / (done + 1)) + math.log(probability / (1 - probability))
    logs = trials * math.log1p(-probability) + np.concatenate(([0.0], np.cumsum(steps)))
    top = float(logs.max())
    return min(1.0, math.exp(top) * float(np.exp(logs - top).sum()))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a probability (Clopper and Pearson 1934), e.g. of equal rows.

    Raises:
        CalibrationError: the level is not in (0, 1), or the counts make no sense.
    """
    _check_share("level", level)
    if not 0 <= successes <= trials or trials == 0:
        raise CalibrationError(f"found {successes} of {trials}; allowed: 0 to n of n > 0")
    alpha = (1 - level) / 2

    def upper(count: int) -> float:
        return _smallest(lambda risk: binomial_cdf(count, trials, risk) <= alpha)

    low = 1 - upper(trials - successes) if successes else 0.0
    return low, upper(successes) if successes < trials else 1.0


def share_interval(
    parts: Losses, wholes: Losses, *, largest: float, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of E[part] / E[whole] over rows, however tokens of a row hang together.

    The share of agreeing tokens takes agreeing and generated tokens of every row; a mean over rows
    takes wholes of one. For a share R the losses R + (part - R whole) / largest are in [0, 1] and
    have mean R: the interval holds the R that a gambler with fixed bets does not refute, on either
    side. Finite-sample valid.

    Args:
        parts: [n], each between 0 and its row's whole.
        wholes: [n], each between 0 and `largest`.
        largest: bound known beforehand, such as `max_new_tokens`.
        level: confidence in (0, 1).
        seed: fixes the order of the rows, as in `betting`.

    Raises:
        CalibrationError: an argument is out of range, or there is no row.
    """
    _check_share("level", level)
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if part.shape != whole.shape:
        raise CalibrationError(f"found {part.shape} parts of {whole.shape} wholes")
    whole = _checked(whole / largest)
    part = _checked(part / largest)
    if bool((part > whole).any()):
        raise CalibrationError("a part is larger than its whole")
    order = np.random.default_rng(seed).permutation(len(part))
    part, whole, alpha = part[order], whole[order], (1 - level) / 2

    def upper(part: Floats) -> float:
        def is_refuted(risk: float) -> bool:
            return float(_fixed_capital(part - risk * whole).max()) >= -math.log(alpha)

        return _smallest(is_refuted)

    return 1 - upper(whole - part), upper(part)


def _hoeffding_bentkus(total: float, num_rows: int, delta: float) -> float:
    """The p-value from the sum of the losses."""
    risk = min(total / num_rows, delta)
    hoeffding = math.exp(-num_rows * _divergence(risk, delta))
    bentkus = math.e * binomial_cdf(math.ceil(total), num_rows, delta)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(a) from Bernoulli(b), 0 <= a <= b < 1, in nats."""
    of_ones = a * math.log(a / b) if a > 0 else 0.0
    return max(0.0, of_ones + (1 - a) * (math.log1p(-a) - math.log1p(-b)))


def _adaptive_bets(values: Floats, epsilon: float) -> Floats:
    """[n] bets, each from the losses before it."""
    count = np.arange(2, len(values) + 2)
    means = (0.5 + np.cumsum(values)) / count
    variances = (0.25 + np.cumsum((values - means) ** 2)) / count
    before = np.concatenate(([0.25], variances[:-1]))
    bets: Floats = np.minimum(1.0, np.sqrt(-2 * math.log(epsilon) / (len(values) * before)))
    return bets


def _fixed_capital(edge: Floats) -> Floats:
    """[n] log capital of the mixture of fixed bets after each row; edge = loss - bound, [n]."""
    bets = np.asarray(_FIXED_BETS)[:, None]  # [bets, 1]
    logs = np.log(_FIXED_SHARES)[:, None] + np.cumsum(np.log1p(-bets * edge), axis=1)
    capital: Floats = np.logaddexp.reduce(logs, axis=0)
    return capital


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest number in (0, 1) from which on `holds`, rounded up; 1 where there is none."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first integer from low to high that `holds`, which stays true once it is; else high."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _checked(losses: Losses) -> Floats:
    """The losses as an array [n].

    Raises:
        CalibrationError: there are none, or one is not in [0, 1].
    """
    values = np.asarray(losses, np.float64)
    if values.ndim != 1 or not len(values):
        raise CalibrationError(f"losses: found shape {values.shape}; allowed: [n] with n > 0")
    bad = ~((values >= 0) & (values <= 1))
    if bool(bad.any()):
        raise CalibrationError(f"losses: found {values[bad][0]}; allowed: 0 to 1")
    return values


def _check_share(name: str, value: float) -> None:
    """Refuse what is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise CalibrationError(f"{name}: found {value}; allowed: more than 0, less than 1")
