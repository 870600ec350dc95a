"""What audited rows say: figures, and intervals that hold."""

from __future__ import annotations

import random

import pytest

from eevp_batch.records import DISTANCE_STEPS, AuditCounts
from eevp_batch.tune.audited import audit_figures
from eevp_batch.tune.bounds import binomial_cdf

MOST = 64


def audited(rows: int, risk: float, seed: int) -> AuditCounts:
    """Rows of 8 to 64 tokens, each of which differs with probability `risk`."""
    draw, counts = random.Random(seed), AuditCounts()
    for _ in range(rows):
        length = draw.randint(8, MOST)
        place = next((p for p in range(length) if draw.random() < risk), None)
        if place is None:
            counts.equal[length] += 1
            counts.distances[0] += 1
        else:
            counts.diverged[place, length] += 1
            counts.distances[DISTANCE_STEPS * (length - place) // length] += 1
    return counts


def test_nothing_is_said_of_no_rows() -> None:
    assert audit_figures(AuditCounts()) is None


def test_the_figures_count_what_was_looked_at() -> None:
    counts = AuditCounts()
    counts.equal[10] = 3
    counts.diverged[4, 20] = 1  # five of twenty tokens looked at
    counts.distances[0], counts.distances[DISTANCE_STEPS // 2] = 3, 1
    found = audit_figures(counts)
    assert found is not None
    assert (found.rows, found.diverged, found.tokens) == (4, 1, 35)
    assert found.disagreement == pytest.approx((1 / 20) / (3 + 5 / 20))
    assert found.mean_first_divergence == 4
    assert found.distance == pytest.approx(0.125)
    for value, (low, high) in (
        (found.disagreement, found.disagreement_interval),
        (found.distance, found.distance_interval),
        (0.25, found.diverged_interval),
    ):
        assert 0 <= low < value < high <= 1, "an estimate lies in its interval"


@pytest.mark.parametrize("risk", [0.002, 0.02, 0.2])
def test_the_interval_holds_as_often_as_it_says(risk: float) -> None:
    trials, missed = 200, 0
    for seed in range(trials):
        found = audit_figures(audited(60, risk, seed))
        assert found is not None
        low, high = found.disagreement_interval
        missed += not low <= risk <= high
    assert binomial_cdf(missed - 1, trials, 0.05) < 0.999, f"{missed} of {trials} intervals miss"


def test_more_rows_say_more() -> None:
    widths = []
    for rows in (50, 500, 5000):
        found = audit_figures(audited(rows, 0.02, 1))
        assert found is not None
        low, high = found.disagreement_interval
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.005


def test_equal_rows_alone_bound_the_disagreement_from_above() -> None:
    found = audit_figures(audited(400, 0.0, 0))
    assert found is not None and found.disagreement == 0
    low, high = found.disagreement_interval
    assert low == 0 and high < 0.015


def test_counts_survive_json() -> None:
    counts = audited(50, 0.05, 2)
    assert AuditCounts.from_json(counts.to_json()) == counts
    assert (counts + counts).rows == 100
