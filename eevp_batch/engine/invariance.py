"""What keeps a row's result independent, to the last bit, of how many other rows there are.

CPU kernels for matrix products are chosen by size, and another kernel sums in another order. A
batch that would fall below such a boundary is filled up; no batch of a real model is that small
but one of a single row.
"""

from __future__ import annotations

ROW_MULTIPLE = 16
"""Dense products are padded to a multiple of this many rows: float32 kernels sum in another order
for fewer than 4, and bfloat16 ones when rows x width x width is small."""

_SMALL_PRODUCT = 4096
"""torch gives bfloat16 products of at most so many multiply-adds to another kernel."""


def fewest_rows(work_per_row: int) -> int:
    """Rows that a batched product needs at least.

    Args:
        work_per_row: multiply-adds of one row, at the least.

    Returns:
        2 or more: a single row is a matrix times a vector, a kernel of its own in float32.
    """
    return max(2, _SMALL_PRODUCT // work_per_row + 1)
