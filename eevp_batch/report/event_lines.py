"""The event log for people: one line an event, time first."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from eevp_batch.records import replica_number

_LONG = ("machine", "files", "pid", "node_id")  # facts for programs


def event_line(event: dict[str, Any]) -> str:
    """One event as one line: time (UTC), name, what it says.

    Args:
        event: what `read_events` gave.
    """
    unix_s = event.get("unix_s")
    when = "-" if unix_s is None else f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S}"
    facts = [
        f"{name}={_text(value)}"
        for name, value in event.items()
        if name not in ("unix_s", "event", *_LONG) and value is not None
    ]
    return " ".join([when, str(event.get("event")), *facts])


def is_about(event: dict[str, Any], replica: int) -> bool:
    """Whether an event names a replica of one place of the fleet.

    Args:
        event: what `read_events` gave.
        replica: number of the place, from 0.
    """
    return replica_number(str(event.get("replica"))) == replica


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())
