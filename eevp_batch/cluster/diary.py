"""Tells the event log and a person what happens in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.news import News
from eevp_batch.cluster.progress import Stopwatch


class Diary:
    """Where a run's events go.

    Args:
        events: the event log.
        say: told in one sentence what a person wants to know as it happens.

    Attributes:
        say: as given.
        in_storage: adds up the seconds of writing; others may add theirs.
    """

    def __init__(self, events: EventLog, say: Callable[[str], None]) -> None:
        self._events = events
        self.say = say
        self.in_storage = Stopwatch()

    def write(self, event: str, **fields: Any) -> None:
        """Write an event that no person is told of."""
        with self.in_storage:
            self._events.write(event, **fields)

    def flush(self) -> None:
        """Write what the event log has held back; call it now and then."""
        with self.in_storage:
            self._events.flush()

    def tell(self, told: News) -> None:
        """Write an event and say its sentence."""
        self.write(told.event, **told.fields)
        self.say(told.text)

    def of_lease(self, event: str, lease: Lease, **fields: Any) -> None:
        """Write an event about a lease."""
        names = {"chunk_id": lease.chunk_id, "epoch": lease.epoch, "replica": lease.replica}
        self.write(event, **names, **fields)
