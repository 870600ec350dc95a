"""The coordinator's side of a commit: check, publish, record. The record is the commit point.

A crash between any two operations leaves a chunk either recorded, with its parts in place, or
unrecorded, and then whatever stands under its names is replaced or removed by the next commit of
that chunk. Only one coordinator commits to a folder at a time: `Committer.lock` holds others off,
and `Committer.check_lock` stops this one where another has taken over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from eevp_batch.errors import JobFailedError, StaleAttemptError, VerifyFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.attempts import Attempt, write_attempt
from eevp_batch.storage.commit_record import CommitRecord, committed_chunks, read_record
from eevp_batch.storage.lock import HeldLock
from eevp_batch.storage.plan import Chunk, Plan
from eevp_batch.storage.store import Store, is_temporary
from eevp_batch.storage.verify import verify_parts


class Committer:
    """Commits attempts to one output folder. Only the coordinator has one."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store = store
        self.plan = plan
        self._held: HeldLock | None = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other coordinators while the block runs.

        Raises:
            UsageError: another process runs a job here.
        """
        store = self.store
        with store.lock(layout.LOCK) as self._held:
            self.store = store.guarded(self._held.check)
            try:
                yield
            finally:
                self.store, self._held = store, None

    def check_lock(self) -> None:
        """Make sure that the lock, if it was taken, is still held; call it before each change.

        Raises:
            JobFailedError: another process has taken the folder over.
        """
        if self._held is not None:
            self._held.check()

    def committed(self) -> set[int]:
        """The chunks that need no more work, from the names of the records alone."""
        return committed_chunks(self.store)

    def commit(self, attempt: Attempt, current_epoch: int) -> CommitRecord:
        """Publish an attempt and record it; calling it again with the same attempt changes nothing.

        Raises:
            StaleAttemptError: the attempt is of another lease, or its chunk is committed already;
                its files are gone.
            JobFailedError: it does not hold the planned rows, or its files are gone.
        """
        chunk = self._chunk(attempt)
        record = self._record(attempt)
        if attempt.epoch != current_epoch:
            self._discard(attempt)
            raise StaleAttemptError(
                f"chunk {chunk.name}: an attempt of lease {attempt.epoch} came during "
                f"lease {current_epoch}"
            )
        earlier = read_record(self.store, chunk.chunk_id)
        if earlier is not None and earlier.attempt == record.attempt:
            return earlier
        if earlier is not None:
            self._discard(attempt)
            raise StaleAttemptError(f"chunk {chunk.name} is committed already")
        _check_attempt(attempt, chunk, self.plan.num_samples)
        self.check_lock()
        self._publish(attempt.data_path, layout.data_part(chunk.chunk_id), attempt.data_sha256)
        self._publish(
            attempt.errors_path, layout.errors_part(chunk.chunk_id), attempt.errors_sha256
        )
        self.check_lock()
        self.store.create_exclusive(layout.commit_record(chunk.chunk_id), record.to_json().encode())
        return record

    def records(self) -> Iterator[CommitRecord]:
        """The records in chunk order, read one at a time."""
        for chunk in self.plan.chunks:
            record = read_record(self.store, chunk.chunk_id)
            if record is not None:
                yield record

    def totals(self) -> ChunkStats:
        """The counters of all committed chunks."""
        return sum((record.attempt.stats for record in self.records()), start=ChunkStats())

    def clean_attempts(self) -> None:
        """Remove what an earlier run left without a record; call it once, before the first lease.

        That is every attempt, every temporary file, every published part whose record was never
        written, and a `_SUCCESS` that no longer holds because a chunk lacks its record.
        """
        done = self.committed()
        for name in self.store.list(layout.ATTEMPTS_DIR):
            self.store.delete(f"{layout.ATTEMPTS_DIR}/{name}", missing_ok=True)
        for folder in (layout.DATA_DIR, layout.ERRORS_DIR, layout.COMMITS_DIR, layout.META_DIR):
            for name in self.store.names(folder):
                chunk_id = layout.part_chunk_id(name)
                if is_temporary(name) or (chunk_id is not None and chunk_id not in done):
                    self.store.delete(f"{folder}/{name}", missing_ok=True)
        if len(done) < len(self.plan.chunks):
            self.store.delete(layout.SUCCESS, missing_ok=True)

    def finish(self, run_info: dict[str, Any]) -> dict[str, Any]:
        """Verify the whole output and write `_SUCCESS`, last of all.

        Args:
            run_info: what the run wants to leave beside the counts; JSON types.

        Returns:
            What `_SUCCESS` holds.

        Raises:
            VerifyFailedError: a row is not accounted for, or a part is damaged.
        """
        self.check_lock()
        report = verify_parts(self.store, self.plan)
        if report.problems:
            raise VerifyFailedError(self.store.text, report.problems)
        success = {**report.summary(self.plan), "run": run_info}
        self.check_lock()
        self.store.write(layout.SUCCESS, (json.dumps(success, indent=1) + "\n").encode())
        return success

    def _chunk(self, attempt: Attempt) -> Chunk:
        if not 0 <= attempt.chunk_id < len(self.plan.chunks):
            raise JobFailedError(f"chunk {attempt.chunk_id} is not in the plan")
        return self.plan.chunks[attempt.chunk_id]

    def _record(self, attempt: Attempt) -> CommitRecord:
        chunk_id = attempt.chunk_id
        published = replace(
            attempt,
            data_path=None if attempt.data_path is None else layout.data_part(chunk_id),
            errors_path=None if attempt.errors_path is None else layout.errors_part(chunk_id),
        )
        return CommitRecord(self.plan.run_id, self.plan.fingerprint, published, time.time())

    def _publish(self, path: str | None, part: str, sha256: str | None) -> None:
        """Put one file, or its absence, under its final name."""
        if path is None:
            # An earlier attempt of this chunk may have been published and never recorded.
            self.store.delete(part, missing_ok=True)
        elif self.store.exists(path):
            self.store.publish(path, part)
        elif not self.store.exists(part) or self.store.sha256(part) != sha256:
            raise JobFailedError(f"{self.store.text}: attempt file {path} is gone")

    def _discard(self, attempt: Attempt) -> None:
        for path in attempt.paths:
            self.store.delete(path, missing_ok=True)


def _check_attempt(attempt: Attempt, chunk: Chunk, num_samples: int) -> None:
    """Check that an attempt's counts are those of its chunk.

    Raises:
        JobFailedError: names the count that differs.
    """
    facts = [
        ("rows", attempt.rows_ok + attempt.rows_error, chunk.num_rows),
        ("generations", attempt.generations, attempt.rows_ok * num_samples),
        ("id digest", attempt.id_digest, chunk.id_digest),
        ("data file", attempt.data_path is not None, attempt.rows_ok > 0),
        ("errors file", attempt.errors_path is not None, attempt.rows_error > 0),
    ]
    for name, found, planned in facts:
        if found != planned:
            raise JobFailedError(
                f"chunk {chunk.name}, attempt of {attempt.replica}: {name}: found {found}; "
                f"allowed: {planned}"
            )


__all__ = [
    "Attempt",
    "CommitRecord",
    "Committer",
    "committed_chunks",
    "read_record",
    "write_attempt",
]
