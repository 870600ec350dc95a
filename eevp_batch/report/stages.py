"""A long command on a screen, stage by stage: a bar with the time left, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from eevp_batch.report.screen import BarBelowLines, PlainLines, Screen
from eevp_batch.report.text import duration, number

_FIRST_DUE_S, _DUE_S = 5.0, 30.0


class Stages(Screen, Protocol):
    """Shows stages and messages while it is entered."""

    def update(self, stage: str, done: int, total: int) -> None:
        """How far a stage is; the first update of a stage begins its clock."""


def make_stages(stream: TextIO) -> Stages:
    """Bars where the stream is a terminal, else plain lines."""
    return BarStages(stream) if stream.isatty() else PlainStages(stream)


class PlainStages(PlainLines):
    """A line when a stage is done, and some in between where it takes long; see `PlainLines`."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._stage = ""
        self._began_s, self._due_s, self._first = 0.0, 0.0, 0

    def update(self, stage: str, done: int, total: int) -> None:
        """Write a line if one is due."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began_s, self._first = stage, now, done
            self._due_s = now + _FIRST_DUE_S
        if done == total:
            self.message(f"{stage}: done")
        elif now >= self._due_s and done > self._first:
            self._due_s = now + _DUE_S
            left_s = (now - self._began_s) / (done - self._first) * (total - done)
            self.message(f"{stage}: {number(done)}/{number(total)}, {duration(left_s)} left")


class BarStages(BarBelowLines):
    """A bar for the stage of the moment at the foot of a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        text = TextColumn("{task.description}", markup=False)
        columns = (text, MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(stream, *columns, is_kept=False)
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        """Redraw; a stage that is done becomes a line."""
        if stage != self._stage:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._stage = stage
            self._bar.add_task(stage, total=total, completed=done)
            self._bar.refresh()
        self._bar.update(self._bar.task_ids[-1], completed=done)
        if done == total:
            self.message(f"{stage}: done")
