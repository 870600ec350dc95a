"""The event log for people, and whose event a line is."""

from __future__ import annotations

import pytest

from eevp_batch.records import replica_number
from eevp_batch.report.event_lines import event_line, is_about


def test_an_event_is_one_line() -> None:
    event = {
        "unix_s": 0.0,
        "event": "replica_dead",
        "replica": "eevp-replica-1",
        "pid": 7,
        "reason": "two\nlines",
        "chunks": [3, 4],
        "cause": None,
    }
    assert event_line(event) == (
        "1970-01-01 00:00:00 replica_dead replica=eevp-replica-1 reason=two lines chunks=[3, 4]"
    )
    assert event_line({"event": "job_started"}) == "- job_started"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("eevp-replica-0", 0),
        ("eevp-replica-12.3", 12),
        ("eevp:corpus-demo/replica-2", 2),
        ("eevp:replica-7/replica-2.4", 2),
        ("eevp:replica-7", 7),
        ("JobSupervisor", None),
        ("None", None),
    ],
)
def test_a_replicas_name_says_its_place(name: str, number: int | None) -> None:
    assert replica_number(name) == number
    assert is_about({"event": "chunk_leased", "replica": name}, 2) == (number == 2)
