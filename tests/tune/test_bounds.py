"""P-values and intervals against brute force, and the properties that make them valid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind
from eevp_batch.tune.bounds import (
    betting,
    binomial_cdf,
    clopper_pearson,
    hoeffding_bentkus,
    p_value,
    rows_needed,
    rows_needed_by_betting,
    share_interval,
)

KINDS: tuple[PValueKind, ...] = ("hoeffding_bentkus", "betting")
shares = st.floats(0.01, 0.99)
some_losses = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def brute_cdf(successes: int, trials: int, probability: float) -> float:
    return math.fsum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(successes + 1)
    )


@pytest.mark.parametrize("trials", [1, 2, 17, 60])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.93])
def test_binomial_tail_is_the_sum_of_its_terms(trials: int, probability: float) -> None:
    for successes in range(trials + 1):
        wanted = brute_cdf(successes, trials, probability)
        assert binomial_cdf(successes, trials, probability) == pytest.approx(wanted, rel=1e-12)
    assert binomial_cdf(-1, trials, probability) == 0
    assert binomial_cdf(0, trials, 0.0) == 1
    assert binomial_cdf(trials - 1, trials, 1.0) == 0


def test_a_long_binomial_tail_keeps_its_digits() -> None:
    wanted = math.fsum(
        math.exp(
            math.lgamma(100_001)
            - math.lgamma(k + 1)
            - math.lgamma(100_001 - k)
            + k * math.log(0.01)
            + (100_000 - k) * math.log1p(-0.01)
        )
        for k in range(951)
    )
    assert binomial_cdf(950, 100_000, 0.01) == pytest.approx(wanted, rel=1e-7)


def test_hoeffding_bentkus_by_hand() -> None:
    # 100 rows, one of them wrong, delta 0.05, each term of arXiv 2110.01052 written out
    losses = [1.0] + [0.0] * 99
    divergence = 0.01 * math.log(0.01 / 0.05) + 0.99 * math.log(0.99 / 0.95)
    hoeffding = math.exp(-100 * divergence)
    bentkus = math.e * (0.95**100 + 100 * 0.05 * 0.95**99)
    assert hoeffding_bentkus(losses, 0.05) == pytest.approx(min(hoeffding, bentkus), rel=1e-12)
    assert hoeffding_bentkus([0.0] * 59, 0.05) == pytest.approx(0.95**59, rel=1e-12)


def test_betting_by_hand() -> None:
    losses, delta, epsilon, seed = [0.0, 0.3, 0.1, 0.0, 0.9, 0.0], 0.4, 0.1, 3
    ordered = [losses[i] for i in np.random.default_rng(seed).permutation(6)]
    fixed = {1.0: 0.25, 0.5: 0.125, 0.25: 0.0625, 0.125: 0.03125, 0.0625: 1 / 64, 0.03125: 1 / 64}
    adaptive, best, total, squares = 0.5, 0.0, 0.5, 0.25
    for count, loss in enumerate(ordered, 1):
        variance = squares / count
        adaptive *= 1 - min(1, math.sqrt(2 * math.log(10) / (6 * variance))) * (loss - delta)
        fixed = {bet: capital * (1 - bet * (loss - delta)) for bet, capital in fixed.items()}
        total += loss
        squares += (loss - total / (count + 1)) ** 2
        best = max(best, adaptive + sum(fixed.values()))
    found = betting(losses, delta, epsilon=epsilon, seed=seed)
    assert best > 1, "the example should refute a little"
    assert found == pytest.approx(1 / best, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(losses=some_losses, low=shares, high=shares)
@settings(deadline=None)
def test_a_looser_bound_is_easier_to_certify(
    kind: PValueKind, losses: list[float], low: float, high: float
) -> None:
    low, high = min(low, high), max(low, high)
    tight = p_value(kind, losses, low, epsilon=0.1, seed=1)
    loose = p_value(kind, losses, high, epsilon=0.1, seed=1)
    assert 0 < loose <= tight * (1 + 1e-9) <= 1 + 1e-9


@given(losses=some_losses, worse=st.data(), delta=shares)
@settings(deadline=None)
def test_more_risk_is_harder_to_certify(
    losses: list[float], worse: st.DataObject, delta: float
) -> None:
    higher = [worse.draw(st.floats(loss, 1)) for loss in losses]
    assert hoeffding_bentkus(higher, delta) >= hoeffding_bentkus(losses, delta) * (1 - 1e-9)


@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_hoeffding_bentkus_is_uniform_or_larger_under_the_null(delta: float, num_rows: int) -> None:
    # exactly: losses of 0 or 1 with mean delta, all counts that can occur
    values, chances = [], []
    for bad in range(num_rows + 1):
        values.append(hoeffding_bentkus([1.0] * bad + [0.0] * (num_rows - bad), delta))
        chances.append(math.comb(num_rows, bad) * delta**bad * (1 - delta) ** (num_rows - bad))
    for level in values:
        below = sum(c for v, c in zip(values, chances, strict=True) if v <= level)
        assert below <= level * (1 + 1e-9)


@pytest.mark.parametrize("adverse", [1.0, 0.7])
def test_betting_is_uniform_or_larger_under_the_null(adverse: float) -> None:
    # exactly: every sequence of 12 losses that are 0 or `adverse`, with mean delta
    delta, num_rows = 0.2, 12
    chance_of_bad = delta / adverse
    values, chances = [], []
    for pattern in itertools.product((0.0, adverse), repeat=num_rows):
        bad = sum(loss > 0 for loss in pattern)
        values.append(betting(pattern, delta, epsilon=0.1, seed=0))
        chances.append(chance_of_bad**bad * (1 - chance_of_bad) ** (num_rows - bad))
    order = np.argsort(values)
    below = np.cumsum(np.asarray(chances)[order])
    sorted_values = np.asarray(values)[order]
    assert sorted_values[0] < 0.3, "the best case should refute something"
    last = np.append(sorted_values[1:] > sorted_values[:-1], True)  # the last of equal values
    assert (below[last] <= sorted_values[last] * (1 + 1e-9)).all()


def test_betting_certifies_small_steady_losses_that_hoeffding_bentkus_cannot() -> None:
    losses = np.random.default_rng(0).beta(0.5, 99.5, 1000)  # mean 0.005, like shares of tokens
    assert betting(losses, 0.01, epsilon=0.05, seed=0) < 0.05
    assert hoeffding_bentkus(losses, 0.01) > 0.05


def test_the_seed_alone_fixes_the_order() -> None:
    losses = np.random.default_rng(0).random(50) * 0.2
    one, again, other = (betting(losses, 0.2, epsilon=0.1, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("delta", "epsilon", "risk"),
    [(0.05, 0.1, 0.0), (0.05, 0.1, 0.02), (0.01, 0.05, 0.005), (0.1, 0.05, 0.07), (0.3, 0.2, 0.1)],
)
def test_rows_needed_is_where_the_test_begins_to_pass(
    delta: float, epsilon: float, risk: float
) -> None:
    def passes(num_rows: int) -> bool:
        total = round(num_rows * risk, 9)
        losses = [1.0] * int(total) + [total % 1]
        return hoeffding_bentkus(losses + [0.0] * (num_rows - len(losses)), delta) <= epsilon

    found = rows_needed(delta, epsilon, risk)
    assert found is not None
    fewest = next(n for n in range(1, found + 1) if passes(n))
    assert passes(found)
    assert 0.95 * found <= fewest


@given(delta=st.floats(0.001, 0.5), epsilon=st.floats(0.001, 0.5), ratio=st.floats(0, 0.95))
@settings(deadline=None)
def test_rows_needed_grow_with_every_wish(delta: float, epsilon: float, ratio: float) -> None:
    found = rows_needed(delta, epsilon, ratio * delta)
    surer, riskier = (
        rows_needed(delta, epsilon / 2, ratio * delta),
        rows_needed(delta, epsilon, (ratio + 0.04) * delta),
    )
    assert found and surer and riskier
    assert surer >= found
    assert riskier >= 0.95 * found, "more risk, fewer rows by more than a step of rounding"


def test_no_number_of_rows_certifies_what_is_too_risky() -> None:
    assert rows_needed(0.01, 0.05, 0.01) is None
    assert rows_needed(0.01, 0.05, math.nextafter(0.01, 0)) is None
    assert (rows_needed(0.01, 0.05, 0.01 - 1e-9) or 0) > 10**12
    assert rows_needed_by_betting([0.02, 0.01], 0.01, 0.05) is None


def test_betting_needs_about_the_rows_that_it_says() -> None:
    rng = np.random.default_rng(5)
    needed = rows_needed_by_betting(rng.beta(0.5, 99.5, 400), 0.01, 0.05)
    assert needed is not None

    def certified(num_rows: int) -> float:
        rows = rng.beta(0.5, 99.5, (20, num_rows))
        return float(np.mean([betting(row, 0.01, epsilon=0.05, seed=0) <= 0.05 for row in rows]))

    assert certified(needed // 2) < 0.5 < certified(needed * 3 // 2)


@pytest.mark.parametrize("trials", [1, 10, 300])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_clopper_pearson_covers_every_probability(trials: int, level: float) -> None:
    intervals = [clopper_pearson(k, trials, level) for k in range(trials + 1)]
    for probability in (0.003, 0.1, 0.5, 0.98):
        misses = [k for k, (a, b) in enumerate(intervals) if not a <= probability <= b]
        chance = math.fsum(
            math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
            for k in misses
        )
        assert chance <= 1 - level + 1e-12


def test_clopper_pearson_of_a_textbook() -> None:
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(0.3085, abs=5e-5))
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)
    assert clopper_pearson(10, 10) == (pytest.approx(1 - 0.3085, abs=5e-5), 1.0)


def test_share_interval_covers_though_tokens_of_a_row_hang_together() -> None:
    # a row is wholly wrong or wholly right, and wrong rows are longer: tokens are far from i.i.d.
    rng = np.random.default_rng(11)
    misses, widths = 0, []
    for _ in range(200):
        wrong = rng.random(150) < 0.1
        wholes = np.where(wrong, 60, 20)
        low, high = share_interval(np.where(wrong, wholes, 0), wholes, largest=64, level=0.9)
        misses += not low <= (0.1 * 60) / (0.1 * 60 + 0.9 * 20) <= high
        widths.append(high - low)
    assert misses <= 0.1 * 200
    assert np.mean(widths) < 0.4, "an interval that says nothing covers too"


def test_share_interval_of_whole_rows_is_not_far_from_the_exact_one() -> None:
    rows = [1.0] * 4 + [0.0] * 396
    low, high = share_interval(rows, np.ones(400), largest=1)
    exact_low, exact_high = clopper_pearson(4, 400)
    assert low <= 0.01 <= high
    assert high - low < 2 * (exact_high - exact_low)


@pytest.mark.parametrize("bad", [[], [0.1, 1.1], [-0.1], [math.nan], [[0.1]]])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_out_of_range_are_refused(kind: PValueKind, bad: list[float]) -> None:
    with pytest.raises(CalibrationError, match="losses: found"):
        p_value(kind, bad, 0.1, epsilon=0.1, seed=0)


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(CalibrationError, match="delta: found 0"):
        hoeffding_bentkus([0.0], 0.0)
    with pytest.raises(CalibrationError, match="epsilon: found 1"):
        betting([0.0], 0.1, epsilon=1, seed=0)
    with pytest.raises(CalibrationError, match="expected risk: found 2"):
        rows_needed(0.1, 0.1, 2)
    with pytest.raises(CalibrationError, match="found 3 of 2"):
        clopper_pearson(3, 2)
    with pytest.raises(CalibrationError, match="larger than its whole"):
        share_interval([2.0], [1.0], largest=4)
    with pytest.raises(CalibrationError, match="losses: found"):
        share_interval([2.0], [5.0], largest=4)
