"""A long command on a screen, stage by stage: a bar with the time left, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eevp_batch.report.text import duration, number

_FIRST_DUE_S, _DUE_S = 5.0, 30.0


class Stages(Protocol):
    """Shows stages and messages while it is entered."""

    def __enter__(self) -> Stages:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        """Leave the screen in order."""

    def update(self, stage: str, done: int, total: int) -> None:
        """How far a stage is; the first update of a stage begins its clock."""

    def message(self, text: str) -> None:
        """Show one line that stays."""


def make_stages(stream: TextIO) -> Stages:
    """Bars where the stream is a terminal, else plain lines."""
    return BarStages(stream) if stream.isatty() else PlainStages(stream)


class PlainStages:
    """A line when a stage is done, and some in between where it takes long.

    Args:
        stream: where to write.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._stage = ""
        self._began_s, self._due_s, self._first = 0.0, 0.0, 0

    def __enter__(self) -> PlainStages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        pass

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

    def message(self, text: str) -> None:
        """Write one line."""
        print(text, file=self._stream, flush=True)


class BarStages:
    """A bar for the stage of the moment at the foot of a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bar = Progress(
            BarColumn(bar_width=22),
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._stage = ""

    def __enter__(self) -> BarStages:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        self._bar.stop()

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

    def message(self, text: str) -> None:
        """Write one line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
