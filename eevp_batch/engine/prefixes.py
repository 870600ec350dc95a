"""Prompt beginnings that several rows share: computed once, their keys/values lent to every row.

A system prompt or a few-shot header stands before every row of a job, and the samples of one row
share all of its prompt. Which beginnings are worth keeping is decided by looking at the prompts
that wait; a row's result does not depend on it, because a token's keys and values are the same
wherever they were computed. Knows ids, pages and counts; touches no tensor of the model.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy

from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.sequence import Sequence

MAX_PREFIXES = 8
LOOK_AHEAD = 64
"""Waiting prompts that a decision looks at."""
WORTHWHILE_TOKENS = 64
"""Tokens that a new prefix has to save at least: a run of its own costs about as much as these."""


@dataclass(slots=True, eq=False)  # arrays do not compare to one truth value
class Prefix:
    """Tokens whose keys/values are held at every depth.

    Attributes:
        token_ids: [T] int64.
        pages: pages of positions 0 .. T - 1; the prefix is one of their owners.
        last_used: number of the admission that used it last.
    """

    token_ids: numpy.ndarray
    pages: list[int]
    last_used: int = 0


def num_common(left: numpy.ndarray, right: numpy.ndarray) -> int:
    """Length of the longest common beginning."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


class Prefixes:
    """The prefixes that are kept, at most `MAX_PREFIXES`; the least recently used one goes first.

    Args:
        pool: whose pages they own.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._kept: list[Prefix] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._kept)

    def best(self, sequence: Sequence) -> tuple[list[int], int]:
        """Pages and number of leading tokens that the sequence can share; the front token never."""
        prefix, length = self._best(sequence)
        if prefix is None:
            return [], 0
        self._clock += 1
        prefix.last_used = self._clock
        return prefix.pages, length

    def _best(self, sequence: Sequence) -> tuple[Prefix | None, int]:
        ids = _ids(sequence)
        prefix, length = None, 0
        for kept in self._kept:
            common = min(num_common(kept.token_ids, ids), sequence.max_shared)
            if common > length:
                prefix, length = kept, common
        return prefix, length

    @property
    def has_room(self) -> bool:
        """Whether one more may be kept, the least recently used one making room if need be."""
        return len(self._kept) < MAX_PREFIXES or self.evict()

    def worth_making(self, sequence: Sequence, waiting: SequenceOf[Sequence]) -> int:
        """How many leading tokens of this prompt to compute once for it and those that wait.

        Returns:
            0 when nothing saves `WORTHWHILE_TOKENS` over what is kept already.
        """
        ids = _ids(sequence)
        have, most = self._best(sequence)[1], sequence.max_shared
        # Rows that share much stand side by side, so the neighbour tells whether to look further.
        if not waiting or min(num_common(ids, _ids(waiting[0])), most) <= have:
            return 0
        common = [min(num_common(ids, _ids(other)), most) for other in waiting]
        common.sort(reverse=True)
        saved = [(length - have) * (rank + 1) for rank, length in enumerate(common)]
        best = max(range(len(saved)), key=saved.__getitem__, default=-1)
        return common[best] if best >= 0 and saved[best] >= WORTHWHILE_TOKENS else 0

    def keep(self, token_ids: list[int], pages: list[int]) -> None:
        """Own these pages from now on."""
        self._clock += 1
        self._kept.append(Prefix(numpy.array(token_ids), pages, self._clock))

    def evict(self) -> bool:
        """Give up the least recently used prefix that no sequence uses now; False without one."""
        idle = [prefix for prefix in self._kept if not self._pool.is_shared(prefix.pages)]
        if not idle:
            return False
        oldest = min(idle, key=lambda prefix: prefix.last_used)
        self._kept.remove(oldest)
        self._pool.drop(oldest.pages)
        return True

    def taint(self) -> None:
        """See `KvPool.taint`: one of them may be why a row's scores are not finite."""
        for prefix in self._kept:
            self._pool.taint(prefix.pages)

    def clear(self) -> None:
        """Give up all of them."""
        for prefix in self._kept:
            self._pool.drop(prefix.pages)
        self._kept.clear()


def _ids(sequence: Sequence) -> numpy.ndarray:
    return numpy.array(sequence.prompt.token_ids)
