"""What everything that is shown while it goes on has in common: lines, or a bar below lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn

_BAR_WIDTH = 22


class Screen(Protocol):
    """Shows messages while it is entered."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        """Leave the screen in order."""

    def message(self, text: str) -> None:
        """Show one line that stays."""


class PlainLines:
    """Plain lines.

    Args:
        stream: where to write.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        pass

    def message(self, text: str) -> None:
        """Write one line; work does not end because its log's disk is full or nobody reads it."""
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)


class BarBelowLines:
    """A bar that redraws itself at the foot of a terminal.

    Args:
        stream: the terminal.
        columns: beside the bar.
        is_kept: whether the bar stays there in the end.
    """

    def __init__(self, stream: TextIO, *columns: ProgressColumn, is_kept: bool = True) -> None:
        self._console = Console(file=stream)
        bar = BarColumn(bar_width=_BAR_WIDTH)
        self._bar = Progress(bar, *columns, console=self._console, transient=not is_kept)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Write one line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
