"""From which batch on a deep segment need not wait for more."""

from __future__ import annotations

from pathlib import Path

from eevp_batch.engine.segment_times import NEAR_BEST, full_batch, nearly_best
from eevp_batch.engine.segmented_model import SegmentedModel
from tests.engine.conftest import load_model


def test_the_smallest_batch_whose_rows_are_nearly_as_cheap_as_any() -> None:
    weights_first = {size: 64.0 + size for size in (16, 32, 64, 128, 192, 1024)}
    assert nearly_best(weights_first) == 1024, "every doubling still pays"
    flat = {size: max(64.0, size) for size in (16, 32, 64, 128, 192)}
    assert nearly_best(flat) == 64, "from there on a row costs the same"
    assert nearly_best({16: 16 * NEAR_BEST, 64: 64.0}) == 16, "nearly is enough"
    assert nearly_best({16: 16 * NEAR_BEST * 1.01, 64: 64.0}) == 64


def test_a_model_is_measured_up_to_its_largest_batch(any_tiny_model: Path) -> None:
    model = SegmentedModel(load_model(any_tiny_model), [2, 6])
    assert full_batch(model, 24) in (16, 24)
    assert full_batch(model, 3) == 3, "there is nothing smaller to choose"
