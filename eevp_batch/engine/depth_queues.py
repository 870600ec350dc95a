"""Who waits at which depth, and which batch runs next.

Pure Python: a sequence is anything with an identity, a cost is a number of packed tokens. No tensor
is touched, so the policy is tested without a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Batch(NamedTuple, Generic[T]):
    """Sequences that run segment `depth` next."""

    depth: int
    sequences: list[T]


class DepthQueues(Generic[T]):
    """One first-in-first-out queue per depth.

    `pop` chooses, in this order:

    1. the queue whose front has waited longest, if that is more than `age_cap` steps;
    2. the deepest queue that holds `full_batch` sequences;
    3. the fullest queue, the deeper one on a tie.

    The age cap comes first because a shallow queue can stay full for ever when every token leaves
    early; a sequence waiting deep would then never run. With it no sequence waits longer than
    `age_cap + R` steps, R being the number of sequences in all queues: past the cap each step takes
    the sequence that has waited longest of all, and whoever is put back is younger.

    Args:
        num_depths: D, one queue per segment.
        max_batch: most sequences per batch.
        full_batch: sequences from which on a batch need not grow: a row is hardly cheaper in a
            larger one.
        max_tokens: most packed tokens per batch; one sequence may exceed it alone.
        age_cap: steps after which waiting outweighs a full batch.
    """

    def __init__(
        self, num_depths: int, max_batch: int, full_batch: int, max_tokens: int, age_cap: int
    ) -> None:
        self.max_batch, self.full_batch = max_batch, full_batch
        self.max_tokens = max_tokens
        self.age_cap = age_cap
        self._queues: list[deque[tuple[int, T]]] = [deque() for _ in range(num_depths)]
        self._now = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues)

    @property
    def lengths(self) -> list[int]:
        """Sequences waiting, by depth."""
        return [len(queue) for queue in self._queues]

    def push(self, depth: int, sequence: T) -> None:
        """Append to the queue of `depth`; the caller makes sure it stands in no other."""
        self._queues[depth].append((self._now, sequence))

    def remove(self, sequence: T) -> None:
        """Take a sequence out of the queue that it stands in."""
        for queue in self._queues:
            for entry in queue:
                if entry[1] is sequence:
                    queue.remove(entry)
                    return

    def pop(
        self,
        cost: Callable[[int, T], int],
        depths: Collection[int] | None = None,
        most: int | None = None,
    ) -> Batch[T] | None:
        """Take the next batch, or None when nobody waits.

        Args:
            cost: packed tokens that (depth, sequence) would bring.
            depths: the queues to look at; None: all.
            most: sequences to take at most, fewer than `max_batch`; None: that many.
        """
        waiting = [
            depth
            for depth, queue in enumerate(self._queues)
            if queue and (depths is None or depth in depths)
        ]
        if not waiting:
            return None
        self._now += 1
        depth = self._choose(waiting)
        queue = self._queues[depth]
        batch: list[T] = []
        room = self.max_tokens
        most = self.max_batch if most is None else min(most, self.max_batch)
        while queue and len(batch) < most:
            room -= cost(depth, queue[0][1])
            if room < 0 and batch:
                break
            batch.append(queue.popleft()[1])
        return Batch(depth, batch)

    def _choose(self, waiting: list[int]) -> int:
        oldest = min(waiting, key=lambda depth: self._queues[depth][0][0])
        if self._now - self._queues[oldest][0][0] > self.age_cap:
            return oldest
        full = [depth for depth in waiting if len(self._queues[depth]) >= self.full_batch]
        if full:
            return full[-1]
        return max(waiting, key=lambda depth: (len(self._queues[depth]), depth))
