from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from eevp_batch.storage.read_ahead import read_ahead


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_answers_come_in_order_and_each_once(at_once: int) -> None:
    assert list(read_ahead(range(100), lambda item: item * item, at_once)) == [
        item * item for item in range(100)
    ]


def test_reads_are_under_way_together_and_no_more_than_allowed() -> None:
    together = threading.Barrier(4)  # passes only once four have come

    def read(item: int) -> int:
        together.wait(30)
        return item

    assert list(read_ahead(range(8), read, 4)) == list(range(8))


def test_items_are_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    answers = read_ahead(items(), lambda item: item, 4)
    assert next(answers) == 0
    answers.close()
    assert len(taken) == 4


def test_an_error_comes_at_the_turn_of_its_item() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise FileNotFoundError(str(item))
        return item

    answers = read_ahead(range(5), read, 3)
    assert [next(answers), next(answers)] == [0, 1]
    with pytest.raises(FileNotFoundError, match="2"):
        next(answers)
