"""A job that keeps within its bound is not stopped; one that leaves it, however late, soon is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eevp_batch.records import AuditCounts
from eevp_batch.tune.bounds import binomial_cdf
from eevp_batch.tune.drift import ALPHA, DriftDetector

BOUND = 0.01


def looks(
    rows: int, risk: float, draw: np.random.Generator, at_once: int = 20
) -> Iterator[AuditCounts]:
    """Some rows at a time, of 24 to 40 tokens, each of which differs with probability `risk`."""
    for _ in range(rows // at_once):
        counts = AuditCounts()
        lengths = draw.integers(24, 41, at_once).tolist()
        places = (draw.geometric(risk, at_once) - 1).tolist()
        for place, length in zip(places, lengths, strict=True):
            if place < length:
                counts.diverged[place, length] += 1
            else:
                counts.equal[length] += 1
        counts.distances[0] += at_once
        yield counts


def noticed_after(detector: DriftDetector, coming: Iterator[AuditCounts]) -> int | None:
    """Rows that come before the detector has noticed; None where it never does."""
    before = detector.rows
    for counts in coming:
        detector.add(counts)
        if detector.has_noticed:
            return detector.rows - before
    return None


def test_no_more_jobs_are_warned_without_reason_than_it_says() -> None:
    """All rows differ exactly as much as they may, and every twenty rows somebody looks."""
    trials = 120
    draws = [np.random.default_rng(seed) for seed in range(trials)]
    wrong = sum(
        noticed_after(DriftDetector(BOUND), looks(2000, BOUND, draw)) is not None for draw in draws
    )
    assert binomial_cdf(wrong - 1, trials, ALPHA) < 0.999, f"{wrong} of {trials} jobs were warned"


@pytest.mark.parametrize(("bound", "risk", "most"), [
    (0.01, 0.05, 50), (0.01, 0.2, 20), (0.02, 0.05, 120), (0.02, 0.2, 30),
])  # fmt: skip
def test_a_change_after_ten_thousand_good_rows_is_noticed_soon(
    bound: float, risk: float, most: int
) -> None:
    """The rows before differ half as much as they may."""
    trials, in_time = 8, 0
    for seed in range(trials):
        draw, detector = np.random.default_rng(seed), DriftDetector(bound)
        assert noticed_after(detector, looks(10_000, bound / 2, draw)) is None
        delay = noticed_after(detector, looks(most, risk, draw, at_once=5))
        in_time += delay is not None
        if delay is not None:
            assert 5 <= detector.since.rows < delay + 200, "it says about when that began"
    assert binomial_cdf(in_time, trials, 0.9) > 0.001, f"{in_time} of {trials} within {most} rows"


def test_exits_that_never_held_are_noticed_at_once() -> None:
    draw, detector = np.random.default_rng(0), DriftDetector(BOUND)
    delay = noticed_after(detector, looks(40, 0.2, draw, at_once=5))
    assert delay is not None and delay <= 15
    assert detector.since.rows == detector.rows, "from the beginning"


def test_rows_that_come_together_have_no_order_and_none_are_no_look() -> None:
    parts = list(looks(200, 0.02, np.random.default_rng(5)))
    there, back = DriftDetector(BOUND), DriftDetector(BOUND)
    there.add(sum(parts, start=AuditCounts()))
    back.add(AuditCounts())
    back.add(sum(reversed(parts), start=AuditCounts()))
    assert back.rows == there.rows == back.since.rows == 200
    assert back._num_looks == 1
    assert np.allclose(back._capital, there._capital)
