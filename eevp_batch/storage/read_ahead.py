"""Many small reads, several of them under way at a time, their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def read_ahead(
    items: Iterable[_Item], read: Callable[[_Item], _Answer], at_once: int
) -> Iterator[_Answer]:
    """`map(read, items)`, where an object store answers after a while, and many at a time.

    Args:
        items: taken as they are needed.
        read: called in threads where `at_once` is more than 1.
        at_once: reads under way; so many results wait at most.

    Raises:
        Exception: what `read` raised, at its item's turn.
    """
    if at_once <= 1:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(at_once, thread_name_prefix="eevp-read") as pool:
        waiting: deque[Future[_Answer]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the reader has lost interest
            for future in waiting:
                future.cancel()
