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


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_in", "num_out"), [(576, 128), (1536, 576), (1024, 1024)])
def test_a_row_is_the_same_in_batches_that_have_other_kernels(
    num_in: int, num_out: int, num_threads: int
) -> None:
    """A CPU with AMX sums in an order of its own up to 32 rows, and from about `num_out` on.

    Terms that cancel show it: a sum is rounded at the size of what is added and taken away.
    """
    weight, rows = drawn(num_out, num_in), drawn(700, num_in)
    weight[:, 0] = weight[:, -1] = 1.0
    rows[:, 0], rows[:, -1] = 4096.0, -4096.0
    product, rows = PackedLinear(weight.bfloat16()), rows.bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = product(rows)
        for count in (1, 2, 5, 30, 33, 64, 127, 130, 260, 512, 577, 699):
            assert torch.equal(product(rows[:count]), together[:count]), f"{count} rows"
    finally:
        torch.set_num_threads(before)


def test_float32_is_left_alone() -> None:
    weight, rows = drawn(96, 64), drawn(8, 64)
    found = PackedLinear(weight)(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rows @ weight.T)
