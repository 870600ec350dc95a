"""Of how many rows products on a CPU are made: of a few sizes, all of which sum in one order.

oneDNN makes a kernel of its own for every number of rows that it meets, in 1 to 3 ms where the
product of 200 rows itself may take 0.1, and keeps 1,024 of them. With exits, hardly two steps have
the same number of rows. And its bfloat16 kernels for AMX do not sum alike: a row may come out
otherwise in a batch of 32 than in one of 40, or from as many rows on as the product has columns.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable

import torch

Product = Callable[[torch.Tensor], torch.Tensor]
"""[N, in] -> [N, out]."""

REFERENCE = 64
"""Rows of the product that those of other sizes have to agree with."""
_LARGEST = 512
_LARGEST_WORK = 4_194_304
"""Numbers that the largest product tried may write; a head's of 64 rows are three million."""
_SIZES = 8
_LEAST_STEP = 4
_SCALE = 4096.0


def to_size(num_rows: int) -> int:
    """Rows up to the next of 4, 8, .. 64, then of 8 sizes between a number and its double.

    The padding is an eighth at most once there are 32, and 4 % on average.
    """
    step = max(_LEAST_STEP, (1 << max(num_rows - 1, 0).bit_length() >> 1) // _SIZES)
    return num_rows + -num_rows % step


def blocks(num_rows: int, sizes: tuple[int, ...]) -> list[int]:
    """Sizes of the products that make so many rows, of those given: whole ones, and what is left.

    The last one may be larger than what is left.
    """
    whole, left = divmod(num_rows, sizes[-1])
    found = [sizes[-1]] * whole
    return [*found, sizes[bisect_left(sizes, left)]] if left else found


def sums_differ(weight: torch.Tensor) -> bool:
    """Whether products with a weight may sum in an order that depends on their rows."""
    on_amx: bool = torch.cpu._is_amx_tile_supported()
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and on_amx


@functools.cache
def alike(
    laid_out: Callable[[torch.Tensor], Product], num_in: int, num_out: int, num_threads: int
) -> tuple[int, ...]:
    """The sizes, ascending, whose bfloat16 products are those of `REFERENCE` rows to the last bit.

    Found by trying, once in a process for each shape: that takes a tenth of a second, nearly all of
    it for kernels that will be used.

    Args:
        laid_out: a weight [out, in] as its product.
        num_in: columns of the weight.
        num_out: its rows.
        num_threads: that products run on; not read, but another number may have other kernels.
    """
    rows, weight = _cancelling(num_in, num_out)
    product = laid_out(weight)
    reference = product(rows[:REFERENCE])
    limit = max(REFERENCE, min(_LARGEST, _LARGEST_WORK // num_out))
    found = []
    size = 0
    while (size := to_size(size + 1)) <= limit:
        same = min(size, REFERENCE)
        if torch.equal(product(rows[:size])[:same], reference[:same]):
            found.append(size)
    return tuple(found)


def _cancelling(num_in: int, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [512, in] and a weight [out, in] whose products tell most orders of sums apart.

    What is summed between a large number and its negative is rounded at the size of that.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_LARGEST, num_in, generator=generator)
    rows[:, 0], rows[:, -1] = _SCALE, -_SCALE
    few = torch.randn(min(num_out, 1024), num_in, generator=generator)
    few[:, 0] = few[:, -1] = 1.0
    weight = few.bfloat16().repeat(-(-num_out // len(few)), 1)[:num_out]
    return rows.bfloat16(), weight
