"""The path of settings, and the test along it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind
from eevp_batch.tune.certify import certify, fixed_sequence, order_path

figures = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def test_the_path_buys_speed_with_risk() -> None:
    risks = [0.02, 0.00, 0.01, 0.01, 0.03, 0.05]
    costs = [15.0, 30.0, 22.0, 20.0, 18.0, 9.0]
    assert order_path(risks, costs) == [1, 3, 0, 5], "2 costs more than 3, 4 more than 0"


@given(figures)
@settings(deadline=None)
def test_the_path_is_the_pareto_front(candidates: list[tuple[int, int]]) -> None:
    path = order_path([r for r, _ in candidates], [c for _, c in candidates])
    on_path = [candidates[i] for i in path]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(on_path))
    for risk, cost in candidates:
        assert any(r <= risk and c <= cost for r, c in on_path), "a setting better than the path"


def test_a_path_needs_figures() -> None:
    assert order_path([], []) == []
    with pytest.raises(CalibrationError, match="2 risks and 1 costs"):
        order_path([0.1, 0.2], [1.0])
    with pytest.raises(CalibrationError, match="not a number"):
        order_path([math.nan], [1.0])


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([], None), ([0.2, 0.0], None), ([0.1, 0.01, 0.11, 0.0], 1), ([0.0], 0), ([math.nan], None)],
)
def test_the_sequence_stops_at_the_first_failure(values: list[float], wanted: int | None) -> None:
    assert fixed_sequence(values, 0.1) == wanted


def test_nothing_behind_the_first_failure_is_looked_at() -> None:
    def losses() -> Iterator[list[float]]:
        yield [0.0] * 100
        yield [0.5] * 100
        pytest.fail("a setting bolder than one that failed was asked for")

    assert certify(losses(), 0.1, 0.05) == 0


@pytest.mark.parametrize("kind", ["betting", "hoeffding_bentkus"])
def test_the_boldest_that_passes_is_certified(kind: PValueKind) -> None:
    losses = [[0.0] * 300, [0.0] * 299 + [1.0], [0.2] * 300, [0.0] * 300]
    assert certify(losses, 0.05, 0.05, kind=kind) == 1
    assert certify(losses[2:], 0.05, 0.05, kind=kind) is None
