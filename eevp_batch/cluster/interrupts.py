"""SIGINT and SIGTERM: the first one drains the job, the second one ends it at once.

So does a request that stands in the output folder, see `storage.cancelling`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from eevp_batch.storage.cancelling import Ending, asked_to_end, forget_request
from eevp_batch.storage.retries import NO_PATIENCE
from eevp_batch.storage.store import Store

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_S = 5.0


class Interrupts:
    """Takes both signals over for a block. In a thread other than the main one it does nothing.

    A signal that is ignored when the block begins stays so: a shell ignores SIGINT for what it
    starts in the background.

    Until `drain_with` names what to do first, and from the second signal on, a signal raises
    KeyboardInterrupt.

    Args:
        stop_within_s: how long after the first signal the job ends whatever is under way, for
            whoever sent it ends the process soon; None: never.
    """

    def __init__(self, stop_within_s: float | None = None) -> None:
        self._drain: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._stop_within_s = stop_within_s
        self._over = threading.Event()

    def __enter__(self) -> Interrupts:
        self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        origin: TracebackType | None,
    ) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def drain_with(self, drain: Callable[[], None]) -> None:
        """Let the first signal call `drain`; call it after Ray's start, which takes SIGTERM."""
        self._drain = drain
        self._install()

    def end(self, how: Ending) -> None:
        """Do what a signal does, from any thread.

        Args:
            how: `drain` as the first signal, `now` as the second one.
        """
        if self._over.is_set() or not self._before:
            return
        if how == "now":
            self._drain = None
        os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def heeding(self, store: Store) -> Iterator[None]:
        """Look for requests in an output folder until the block ends.

        Args:
            store: the output folder, whose lock is held.
        """
        impatient = store.with_patience(NO_PATIENCE)
        forget_request(store)
        stop = threading.Event()

        def look() -> None:
            heeded: Ending | None = None
            while not stop.wait(_LOOK_S):
                asked = None
                with contextlib.suppress(OSError):  # storage that fails is the coordinator's matter
                    asked = asked_to_end(impatient)
                if asked is not None and asked != heeded:
                    heeded = asked
                    self.end(asked)

        thread = threading.Thread(target=look, name="eevp-requests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(_LOOK_S)

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
        if self._stop_within_s is not None:
            threading.Thread(target=self._stop_late, name="eevp-deadline", daemon=True).start()

    def _stop_late(self) -> None:
        if not self._over.wait(self._stop_within_s):
            self.end("now")
