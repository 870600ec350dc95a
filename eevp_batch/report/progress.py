"""A running job on a screen: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO

from rich.progress import TaskID, TextColumn
from rich.table import Column

from eevp_batch.report.screen import BarBelowLines, PlainLines, Screen
from eevp_batch.report.text import duration, number


class JobProgress(Protocol):
    """What a display needs of a running job."""

    @property
    def rows_total(self) -> int:
        """Planned rows."""

    @property
    def rows_done(self) -> int:
        """Rows that are finished."""

    @property
    def rows_error(self) -> int:
        """Rows in error among them."""

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens per second, lately."""

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean over all generated tokens."""

    @property
    def eta_s(self) -> float | None:
        """Seconds left."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""

    @property
    def replicas(self) -> int:
        """Replicas that the job asks for."""

    @property
    def replicas_ready(self) -> int:
        """Replicas that have their model."""

    @property
    def is_draining(self) -> bool:
        """Whether only work under way is awaited."""


class Display(Screen, Protocol):
    """Shows progress and messages while it is entered."""

    def update(self, progress: JobProgress) -> None:
        """Take the newest numbers."""


def make_display(stream: TextIO, wants_bar: bool = True) -> Display:
    """A bar where the stream is a terminal and a bar is wanted, else plain lines.

    Args:
        stream: where to show; messages belong on stderr.
        wants_bar: False for plain lines anywhere.
    """
    if wants_bar and stream.isatty():
        return BarDisplay(stream)
    return PlainDisplay(stream)


class PlainDisplay(PlainLines):
    """Plain lines, five seconds apart at first, a minute apart in a long run; see `PlainLines`."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._due_s = 0.0
        self._unseen: JobProgress | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        if self._unseen is not None:
            self.message(describe(self._unseen))

    def update(self, progress: JobProgress) -> None:
        """Write a line if one is due; the last state is always written in the end."""
        if self._clock() < self._due_s:
            self._unseen = progress
            return
        self._unseen = None
        self._due_s = self._clock() + min(60.0, max(5.0, progress.elapsed_s / 20))
        self.message(describe(progress))


class BarDisplay(BarBelowLines):
    """A bar that redraws itself at the foot of a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        column = Column(no_wrap=True)
        super().__init__(
            stream, TextColumn("{task.description}", markup=False, table_column=column)
        )
        self._task: TaskID | None = None

    def update(self, progress: JobProgress) -> None:
        """Redraw."""
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.rows_total)
        text = f"{_rows(progress)}\n{_rates(progress)}"  # two lines, to fit into 80 columns
        self._bar.update(self._task, completed=progress.rows_done, description=text)


def describe(progress: JobProgress) -> str:
    """One line: rows, errors, replicas that are not ready; speed, mean exit layer, time left."""
    return ", ".join(part for part in (_rows(progress), _rates(progress)) if part)


def _rows(progress: JobProgress) -> str:
    share = progress.rows_done / max(progress.rows_total, 1)
    parts = [f"{number(progress.rows_done)}/{number(progress.rows_total)} rows ({share:.0%})"]
    if progress.rows_error:
        parts.append(f"{number(progress.rows_error)} in error")
    if progress.replicas_ready < progress.replicas:
        parts.append(f"{progress.replicas_ready}/{progress.replicas} replicas ready")
    return ", ".join(parts)


def _rates(progress: JobProgress) -> str:
    parts = []
    if progress.tokens_per_s is not None:
        parts.append(f"{number(progress.tokens_per_s)} tokens/s")
    if progress.mean_exit_layer is not None:
        parts.append(f"mean exit layer {progress.mean_exit_layer:.1f}")
    if progress.is_draining:
        parts.append("draining")
    elif progress.eta_s is not None and progress.rows_done < progress.rows_total:
        parts.append(f"{duration(progress.eta_s)} left")
    return ", ".join(parts)
