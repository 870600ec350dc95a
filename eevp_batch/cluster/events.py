"""The job's diary: one JSON object a line in `_eevp/events.jsonl`, for people and for `status`.

Every line has `unix_s` (wall clock) and `event`. A run of the job begins at `job_started`,
`job_resumed` or `retry_started`.

| event | further fields |
|---|---|
| `job_started`, `job_resumed` | `chunks`, `chunks_committed` (by earlier runs), `replicas`, `pid`,
| | `address` (that the job names), `submission_id` (to a job server, or null) |
| `retry_started` | `chunks`, `rows` (error rows that are tried again), `replicas`, `pid` |
| `replica_placed` | `replica` (that has a place on a node and starts there) |
| `replica_ready` | `replica`, `pid`, `node_id`, `max_resident`, `leases`, `start_s`, `machine` |
| `replica_dead` | `replica`, `reason`, `chunks` (ids that it held) |
| `replica_left` | the same, of one that was told to end or had nothing left to do |
| `chunk_leased` | `chunk_id`, `epoch`, `attempt`, `replica`, `phase`, `span`, `is_copy` |
| `chunk_given_up` | `chunk_id`, `epoch`, `replica`, `is_leaving` (or another one was first) |
| `row_set_aside` | `chunk_id`, `number` (of the row in what was leased), `deaths` |
| `chunk_committed` | `chunk_id`, `epoch`, `replica`, `rows_ok`, `rows_error`, `generated_tokens` |
| `memory_shortage` | `replica`, `steps` (that ran out of memory), `max_resident` (for some time) |
| `attempt_discarded` | `chunk_id`, `epoch`, `replica`, `reason` |
| `learning_started` | `replica`, `chunks` (how many it learns from) |
| `exits_learned`, `learning_failed` | `reason`, `files` (sha256 by name), `layers`, .. |
| `audit_drift` | `rows` (audited, since it began), `rows_before`, `disagreement` and `interval` (of
| | the rows since), `bound`, `stops_exits` |
| `chunk_set_aside` | `chunk_id`, `problems`, `records` (where they are now); before `job_resumed` |
| `job_draining` | `chunks_in_flight` |
| `job_finished` | `wall_s`, `rows_ok`, `rows_error`, `generated_tokens`, `replica_deaths` |
| `job_interrupted`, `job_failed` | `reason`, `chunks_committed`, `wall_s` |
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from eevp_batch.storage import layout
from eevp_batch.storage.store import Store

_OF_CHUNKS = ("chunk_leased", "chunk_committed")
_MOST_HELD = 500


class EventLog:
    """Appends events; what is written is never needed to go on with the job.

    Where each append is a file of its own, events of chunks are held until the next `flush`, or
    until another event comes: a job of a million chunks would leave two million files.
    """

    def __init__(self, store: Store, held: Sequence[str] = ()) -> None:
        self._store = store
        self._held = list(held)

    def on(self, store: Store) -> EventLog:
        """The same log, with what is held, through another view of its folder."""
        return EventLog(store, self._held)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        line = {"unix_s": round(time.time(), 3), "event": event, **fields}
        self._held.append(json.dumps(line, ensure_ascii=False))
        is_held = event in _OF_CHUNKS and not self._store.appends_cheaply
        if not is_held or len(self._held) >= _MOST_HELD:
            self.flush()

    def flush(self) -> None:
        """Append what is held."""
        if self._held:
            self._store.append_line(layout.EVENTS, "\n".join(self._held))
            self._held.clear()
