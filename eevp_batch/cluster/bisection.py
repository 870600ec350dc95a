"""Finding the rows that kill replicas. No Ray, no clock.

Nothing tells the death of a replica by one of its rows from one by the machine: the kernel ends a
process that is out of memory with the same signal as an operator does. So no single death is held
against a row. A chunk that has been on `SUSPECT_AFTER` replicas when they died, whatever for, runs
alone on a replica; when that dies too, the chunk is halved, and each half runs alone, and so on. A
span of rows that comes through is kept as a *piece*, and its rows never run again. A row is set
aside, as an error row, once replicas that held that one row and nothing else have died
`row_deaths` times in a row. So deaths that have nothing to do with a row cost time, not rows: to
lose one, the same accident has to meet it alone each time. At the end all pieces and the error
rows of a chunk are committed as the one part that was planned; where a run ends before that, the
next one begins with the whole chunk.

Bounds within one run, where replicas die of nothing else, for a chunk of n rows of which k kill
(A = `row_deaths`); copies of a chunk (`stragglers`) come on top, and suspects are never copied:

- deaths: at most SUSPECT_AFTER + k (ceil(log2 n) + A);
- runs of a row that does not kill: at most SUSPECT_AFTER + ceil(log2 n) + 1;
- of a row that kills: at most SUSPECT_AFTER + ceil(log2 n) + A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eevp_batch.storage.attempts import Attempt

Span = tuple[int, int]
"""Rows from start to before stop, by their numbers in what a chunk's task is about."""

LEAST_ROW_DEATHS = 2


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that is given up.

    Attributes:
        number: its number in what the chunk's task is about.
        deaths: replicas that died while they held nothing else.
        reason: why the last of them died.
    """

    number: int
    deaths: int
    reason: str


class Bisection:
    """A suspect chunk on its way to the rows that kill.

    Args:
        num_rows: rows that the chunk's task is about.
        row_deaths: deaths after which a row that runs alone is set aside.

    Attributes:
        pieces: attempts at spans that came through, in order of their rows.
        set_aside: rows that were given up, in order.
    """

    def __init__(self, num_rows: int, row_deaths: int) -> None:
        self._spans: list[Span] = [(0, num_rows)]  # the next one last
        self._row_deaths = row_deaths
        self._deaths = 0  # in a row, of the next span, which is a single row
        self.pieces: list[Attempt] = []
        self.set_aside: list[SetAside] = []

    @property
    def span(self) -> Span:
        """What is to run next; nothing where only the pieces have to be put together."""
        return self._spans[-1] if self._spans else (0, 0)

    @property
    def is_last(self) -> bool:
        """Whether the whole chunk is done once `span` is."""
        return len(self._spans) <= 1

    def finished(self, piece: Attempt) -> None:
        """The span came through, and is not the last."""
        self._spans.pop()
        self._deaths = 0
        self.pieces.append(piece)

    def died(self, reason: str) -> SetAside | None:
        """A replica that held nothing but the span died.

        Returns:
            The row that is given up for it, if one is.
        """
        start, stop = self.span
        if stop - start > 1:
            middle = (start + stop) // 2
            self._spans[-1:] = [(middle, stop), (start, middle)]
        elif stop - start == 1:
            self._deaths += 1
            if self._deaths >= self._row_deaths:
                found = SetAside(start, self._deaths, reason)
                self._spans.pop()
                self.set_aside.append(found)
                self._deaths = 0
                return found
        return None


def row_deaths(max_attempts: int) -> int:
    """Deaths that set a row aside which runs alone; a single one is never enough.

    Args:
        max_attempts: `run.max_attempts`.
    """
    return max(LEAST_ROW_DEATHS, max_attempts)


def patience(num_rows: int, max_attempts: int) -> int:
    """Deaths of suspects, with nothing finished between them, that still look like bisection.

    One row that kills takes ceil(log2 n) + A; twice that leaves room for its neighbours. Beyond it
    replicas die whatever they are given.

    Args:
        num_rows: rows of a chunk.
        max_attempts: `run.max_attempts`.
    """
    return 2 * (math.ceil(math.log2(max(1, num_rows))) + row_deaths(max_attempts))
