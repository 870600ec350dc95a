"""What is kept of single tokens and rows when they are summed up: it does not grow with them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

NUM_SLOWEST = 10
"""So many of a job's slowest rows are known by name."""


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """Whether the tokens chosen from the whole vocabulary were among the K ids kept; merge by `+`.

    Only tokens that went through the last layer are chosen so, under `final_head: full`.

    Attributes:
        tokens: those of which it is known.
        kept: of them, those whose id had been kept where the vocabulary was cut.
    """

    tokens: int = 0
    kept: int = 0

    def __add__(self, other: KeptTokens) -> KeptTokens:
        return KeptTokens(self.tokens + other.tokens, self.kept + other.kept)

    @property
    def recall(self) -> float | None:
        """Share of the tokens that had been kept, 0..1; None where there are none."""
        return self.kept / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class SlowRow:
    """How long one generation took.

    Attributes:
        seconds: from its first admission to memory until it was finished.
        generated_tokens: in this time.
    """

    seconds: float
    row_id: str | int
    sample_index: int
    generated_tokens: int


def slowest(rows: Iterable[SlowRow]) -> tuple[SlowRow, ...]:
    """The slowest ones, slowest first."""
    return tuple(heapq.nlargest(NUM_SLOWEST, rows, key=lambda row: row.seconds))
