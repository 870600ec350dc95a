"""Segments on devices: whole, consecutive, within memory, and as good as any other placement."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.engine.placement import ModelBytes, Placement, Room, place
from eevp_batch.errors import UsageError


@st.composite
def models(draw: st.DrawFn) -> ModelBytes:
    layers = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    return ModelBytes(
        segments=[draw(st.integers(1, 100)) * number for number in layers],
        segment_layers=layers,
        head=draw(st.integers(1, 200)),
        embedding=draw(st.integers(0, 200)),
        kv_page=draw(st.integers(1, 5)),
        state_page=draw(st.integers(1, 5)),
    )


rooms = st.lists(st.integers(1, 6000), min_size=1, max_size=4)


def pages(model: ModelBytes, memory: list[int], parts: tuple[range, ...], wanted: int) -> int:
    """Pages that fit on all devices."""
    fit = [
        (memory[device] - model.weights(device, part)) // model.page(part)
        for device, part in enumerate(parts)
    ]
    return min(*fit, wanted) if len(fit) > 1 else min(fit[0], wanted)


def fullest(model: ModelBytes, memory: list[int], parts: tuple[range, ...], number: int) -> float:
    """Share of its memory that the fullest device has in use."""
    return max(
        (model.weights(device, part) + number * model.page(part)) / memory[device]
        for device, part in enumerate(parts)
    )


def all_cuts(num_segments: int, num_devices: int) -> list[tuple[range, ...]]:
    cuts = combinations(range(1, num_segments), num_devices - 1)
    return [tuple(range(a, b) for a, b in pairwise([0, *cut, num_segments])) for cut in cuts]


@given(model=models(), memory=rooms, wanted=st.integers(1, 300))
def test_no_other_placement_is_better(model: ModelBytes, memory: list[int], wanted: int) -> None:
    devices = [Room(f"device {number}", size) for number, size in enumerate(memory)]
    cuts = all_cuts(len(model.segments), len(memory))
    most = max((pages(model, memory, cut, wanted) for cut in cuts), default=0)
    if most < 1:
        with pytest.raises(UsageError, match="allowed: "):
            place(model, devices, wanted)
        return
    found = place(model, devices, wanted)
    assert found.segments in cuts, "whole consecutive segments, some on every device"
    assert found.num_pages == most == pages(model, memory, found.segments, wanted)
    rivals = [cut for cut in cuts if pages(model, memory, cut, wanted) == most]
    least = min(fullest(model, memory, cut, most) for cut in rivals)
    assert fullest(model, memory, found.segments, most) == pytest.approx(least)
    assert least <= 1, "what is placed fits"


def test_equal_segments_are_shared_out_evenly() -> None:
    model = ModelBytes([100] * 6, [2] * 6, head=50, embedding=0, kv_page=1, state_page=1)
    found = place(model, [Room("a", 1000), Room("b", 1000), Room("c", 1000)], 10_000)
    assert found.segments == (range(2), range(2, 4), range(4, 6))


def test_keys_and_values_count() -> None:
    """By weights alone the two layers of the first segment would be as heavy as the last ten."""
    model = ModelBytes([50, 50, 50], [10, 1, 1], head=1, embedding=0, kv_page=10, state_page=1)
    found = place(model, [Room("a", 10_000), Room("b", 10_000)], 10_000)
    assert found == Placement((range(1), range(1, 3)), (10_000 - 51) // 101)


def test_what_does_not_fit_is_told_in_numbers() -> None:
    model = ModelBytes([3 << 30, 5 << 30], [8, 16], 1 << 30, 1 << 30, 1 << 20, 1 << 20)
    rooms = [Room("cuda:0", 8 << 30), Room("cuda:1", 4 << 30)]
    with pytest.raises(UsageError) as raised:
        place(model, rooms, 100)
    assert str(raised.value) == (
        "the model does not fit: cuda:1 has 4.0 GiB and would need 6.0 GiB for segment 2 (16 "
        "layers), the head and one page of keys and values; allowed: larger devices, or more of "
        "them"
    )


def test_more_devices_than_segments_are_refused() -> None:
    model = ModelBytes([1, 1], [1, 1], 1, 1, 1, 1)
    with pytest.raises(UsageError, match="devices: found 3; allowed: at most 2"):
        place(model, [Room("a", 100)] * 3, 1)
