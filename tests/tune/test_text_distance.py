"""Distances between outputs, against the textbook's table."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eevp_batch.tune.text_distance import (
    disagreement,
    diverged_loss,
    edit_distance,
    edit_loss,
    first_divergence,
)

outputs = st.lists(st.integers(0, 3), max_size=12)


def textbook(found: list[int], wanted: list[int]) -> int:
    """Wagner and Fischer, row by row."""
    row = list(range(len(wanted) + 1))
    for i, one in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (one != other))
    return row[-1]


@given(outputs, outputs)
@settings(deadline=None)
def test_short_outputs(found: list[int], wanted: list[int]) -> None:
    assert edit_distance(found, wanted) == textbook(found, wanted)


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_outputs_longer_than_a_machine_word(length: int) -> None:
    rng = random.Random(length)
    for alphabet in (2, 50_000):
        found = [rng.randrange(alphabet) for _ in range(length)]
        wanted = [rng.randrange(alphabet) for _ in range(length + 7)]
        edited = [token for token in found if rng.random() < 0.9]
        for other in (wanted, edited):
            assert edit_distance(found, other) == textbook(found, other)


def test_known_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_loss("kitten", "sitting") == 3 / 7
    assert edit_loss([], []) == 0
    assert edit_loss([], [1]) == 1


@pytest.mark.parametrize(
    ("found", "wanted", "position", "loss"),
    [
        ([1, 2, 3], [1, 2, 3], None, 0.0),
        ([1, 2, 3], [1, 9, 3], 1, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 2, 0.5),
        ([], [], None, 0.0),
        ([], [1], 0, 1.0),
    ],
)
def test_first_divergence(
    found: list[int], wanted: list[int], position: int | None, loss: float
) -> None:
    assert first_divergence(found, wanted) == first_divergence(wanted, found) == position
    assert diverged_loss(found, wanted) == pytest.approx(loss)


@given(outputs, outputs)
@settings(deadline=None)
def test_losses_are_shares(found: list[int], wanted: list[int]) -> None:
    assert 0 <= edit_loss(found, wanted) <= diverged_loss(found, wanted) <= 1


def test_disagreement_of_replays() -> None:
    assert disagreement([1, 2, 3, 4], [1, 9, 3, 8]) == 0.5
    assert disagreement([], []) == 0
    with pytest.raises(ValueError, match="longer"):
        disagreement([1, 2], [1, 2, 3])
