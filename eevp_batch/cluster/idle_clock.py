"""Adds up the time in which a thread has nothing running; another thread may read it."""

from __future__ import annotations

import time


class IdleClock:
    """Runs from its making on, except within `with` blocks.

    A reader may be late by one block, never early.
    """

    def __init__(self) -> None:
        self._total_s = 0.0
        self._idle_since_s: float | None = time.monotonic()

    def __enter__(self) -> None:
        since_s = self._idle_since_s
        if since_s is not None:
            self._total_s += time.monotonic() - since_s
        self._idle_since_s = None

    def __exit__(self, *error: object) -> None:
        self._idle_since_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds so far."""
        total_s, since_s = self._total_s, self._idle_since_s
        return total_s if since_s is None else total_s + time.monotonic() - since_s
