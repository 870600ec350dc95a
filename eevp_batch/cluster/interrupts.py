"""SIGINT and SIGTERM: the first one drains the job, the second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Takes both signals over for a block. In a thread other than the main one it does nothing.

    A signal that is ignored when the block begins stays so: a shell ignores SIGINT for what it
    starts in the background.

    Until `drain_with` names what to do first, and from the second signal on, a signal raises
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._drain: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def drain_with(self, drain: Callable[[], None]) -> None:
        """Let the first signal call `drain`; call it after Ray's start, which takes SIGTERM."""
        self._drain = drain
        self._install()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = self._before.setdefault(number, signal.getsignal(number))
            if before is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        drain, self._drain = self._drain, None
        if drain is None:
            raise KeyboardInterrupt
        drain()
