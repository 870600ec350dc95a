"""What keeps a row's result independent of how many other rows there are.

CPU kernels for matrix products are chosen by size, and another kernel sums in another order. In
bfloat16 that shows in the tokens, so there a batch that would fall below such a boundary is filled
up, and a row is the same to the last bit in every batch. In float32 a few boundaries of very short
contexts remain: confidences are then equal to rounding (about 1e-6).
"""

from __future__ import annotations

from collections.abc import Callable

Padding = Callable[[int], int]
"""Of so many rows, how many to make."""

ROW_MULTIPLE = 16
"""Dense products are padded to a multiple of this many rows."""

_SMALL_PRODUCT = 4096
"""torch gives bfloat16 products of at most so many multiply-adds to another kernel."""


def to_multiple(num_rows: int) -> int:
    """Rows up to the next multiple of `ROW_MULTIPLE`."""
    return num_rows + -num_rows % ROW_MULTIPLE


def fewest_rows(work_per_row: int) -> int:
    """Rows that a batched product needs at least.

    Args:
        work_per_row: multiply-adds of one row, at the least.

    Returns:
        2 or more: a single row is a matrix times a vector, a kernel of its own in float32.
    """
    return max(2, _SMALL_PRODUCT // work_per_row + 1)
