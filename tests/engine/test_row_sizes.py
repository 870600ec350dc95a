"""Sizes of products: few, hardly larger than what is asked for, and summed in one order."""

from __future__ import annotations

import pytest
import torch

from eevp_batch.engine.row_sizes import Product, alike, blocks, to_size


def test_sizes_are_few_and_hardly_larger_than_what_is_asked_for() -> None:
    sizes = [to_size(number) for number in range(1, 4097)]
    assert len(set(sizes)) < 70, "oneDNN keeps 1,024 kernels, of a dozen shapes"
    padded = [(size - number) / number for number, size in enumerate(sizes, start=1)]
    assert min(padded) == 0
    assert max(padded[31:]) <= 1 / 8
    assert [to_size(number) for number in (0, 1, 65, 200, 257)] == [0, 4, 72, 208, 288]


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(0, []), (1, [40]), (64, [64]), (65, [80]), (80, [80]), (100, [80, 40]), (240, [80] * 3)],
)
def test_rows_go_into_products_of_the_sizes_that_there_are(
    num_rows: int, expected: list[int]
) -> None:
    assert blocks(num_rows, (40, 64, 80)) == expected


def test_sizes_that_sum_in_another_order_are_found_out() -> None:
    """Of a product that turns its sums around where it has few rows, and where it has many."""

    def turning(weight: torch.Tensor) -> Product:
        def product(rows: torch.Tensor) -> torch.Tensor:
            order = range(weight.shape[1])
            if 40 <= len(rows) < 200:
                order = order[::-1]
            total = torch.zeros(len(rows), len(weight))
            for column in order:
                total += rows[:, column, None].float() * weight[:, column].float()
            return total.bfloat16()

        return product

    sizes = sorted({to_size(number) for number in range(1, 513)})
    assert list(alike(turning, 64, 32, 1)) == [size for size in sizes if 40 <= size < 200]
