from __future__ import annotations

from pathlib import Path

import pyarrow.fs

from eevp_batch.cluster import events
from eevp_batch.cluster.events import EventLog
from eevp_batch.storage import layout
from eevp_batch.storage.status import read_events
from eevp_batch.storage.store import Store


def told(store: Store) -> list[str]:
    return [event["event"] for event in read_events(store)]


def bucket(folder: Path) -> Store:
    """A folder without appends: each line that is appended is a file."""
    return Store(pyarrow.fs.LocalFileSystem(), str(folder))


def test_on_a_disk_every_event_is_there_at_once(tmp_path: Path) -> None:
    log = EventLog(Store.open(tmp_path))
    for number in range(3):
        log.write("chunk_leased", chunk_id=number)
        assert len(told(Store.open(tmp_path))) == number + 1


def test_where_an_append_is_a_file_events_of_chunks_share_one(tmp_path: Path) -> None:
    store = bucket(tmp_path)
    log = EventLog(store)
    log.write("job_started")
    for number in range(100):
        log.write("chunk_leased", chunk_id=number)
        log.write("chunk_committed", chunk_id=number)
    assert told(store) == ["job_started"]
    log.flush()
    assert told(store) == ["job_started", *["chunk_leased", "chunk_committed"] * 100]
    assert len(store.list(f"{layout.EVENTS}.d")) == 2
    log.flush()
    assert len(store.list(f"{layout.EVENTS}.d")) == 2


def test_another_event_brings_those_before_it(tmp_path: Path) -> None:
    store = bucket(tmp_path)
    log = EventLog(store)
    log.write("chunk_leased", chunk_id=1)
    log.write("replica_dead", replica="eevp-replica-0")
    assert told(store) == ["chunk_leased", "replica_dead"]


def test_what_is_held_is_bounded(tmp_path: Path) -> None:
    store = bucket(tmp_path)
    log = EventLog(store)
    for number in range(events._MOST_HELD):
        log.write("chunk_leased", chunk_id=number)
    assert len(told(store)) == events._MOST_HELD


def test_what_is_held_is_written_by_who_takes_the_log_over(tmp_path: Path) -> None:
    store = bucket(tmp_path)
    log = EventLog(store)
    log.write("chunk_committed", chunk_id=1)
    log.on(store).write("job_failed", reason="a reason")
    assert told(store) == ["chunk_committed", "job_failed"]
