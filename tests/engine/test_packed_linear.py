"""Products on a CPU: right to the rounding of their type, the same for a row in every batch."""

from __future__ import annotations

import pytest
import torch

from eevp_batch.engine.packed_linear import PackedLinear


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("widens", [None, True])
def test_a_bfloat16_product_is_the_exact_one_rounded(widens: bool | None, has_bias: bool) -> None:
    weight, rows = drawn(96, 64).bfloat16(), drawn(33, 64).bfloat16()
    bias = drawn(96).bfloat16() if has_bias else None
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = PackedLinear(weight, bias, widens)(rows)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("widens", [None, True])
def test_a_row_is_the_same_in_every_batch(widens: bool | None) -> None:
    product, rows = PackedLinear(drawn(96, 64).bfloat16(), None, widens), drawn(64, 64).bfloat16()
    together = product(rows)
    for count in (1, 2, 3, 16, 40):
        assert torch.equal(product(rows[:count]), together[:count]), f"{count} rows"


def test_float32_is_left_alone() -> None:
    weight, rows = drawn(96, 64), drawn(8, 64)
    found = PackedLinear(weight)(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rows @ weight.T)
