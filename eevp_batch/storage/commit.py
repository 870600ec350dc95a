"""The coordinator's side of a commit: check, publish, record. The record is the commit point.

A crash between any two operations leaves a chunk either recorded, with its parts in place, or
unrecorded, and then whatever stands under its names is replaced or removed by the next commit of
that chunk. Only one coordinator commits to a folder at a time: `Committer.lock` holds others off,
and `Committer.check_lock` stops this one where another has taken over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.errors import JobFailedError, StaleAttemptError, VerifyFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.attempts import Attempt, write_attempt
from eevp_batch.storage.commit_record import (
    CommitRecord,
    CommittedChunk,
    committed_chunks,
    read_committed,
    read_record,
    recorded,
)
from eevp_batch.storage.ids import ids_digest
from eevp_batch.storage.lock import HeldLock
from eevp_batch.storage.plan import Chunk, Plan
from eevp_batch.storage.read_ahead import read_ahead
from eevp_batch.storage.store import Store, is_temporary
from eevp_batch.storage.verify import verify_parts

_FOLDERS = (layout.DATA_DIR, layout.ERRORS_DIR, layout.COMMITS_DIR, layout.META_DIR)


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
        name = layout.commit_record(chunk.chunk_id, attempt.patch)
        if attempt.epoch != current_epoch:
            self.discard(attempt)
            raise StaleAttemptError(
                f"chunk {chunk.name}: an attempt of lease {attempt.epoch} came during "
                f"lease {current_epoch}"
            )
        earlier = read_record(self.store, chunk.chunk_id, attempt.patch)
        if earlier is not None and earlier.attempt == record.attempt:
            self._drop_superseded(attempt)
            return earlier
        if earlier is not None:
            self.discard(attempt)
            raise StaleAttemptError(f"{name}: chunk {chunk.name} is committed already")
        _check_attempt(attempt, chunk, self._expected(attempt, chunk), self.plan.num_samples)
        data = layout.data_part(chunk.chunk_id, attempt.patch)
        errors = layout.errors_part(chunk.chunk_id, attempt.patch)
        self.check_lock()
        self._publish(attempt.data_path, data, attempt.data_sha256)
        self._publish(attempt.errors_path, errors, attempt.errors_sha256)
        self.check_lock()
        self.store.create_exclusive(name, record.to_json().encode())
        self._drop_superseded(attempt)
        return record

    def records(self) -> Iterator[CommitRecord]:
        """The chunks' own records in chunk order, a few of them in memory at a time."""
        ids = (chunk.chunk_id for chunk in self.plan.chunks)
        found = read_ahead(ids, partial(read_record, self.store), self.store.reads_at_once)
        return (record for record in found if record is not None)

    def chunks(self) -> Iterator[CommittedChunk]:
        """The committed chunks with their patches, in order, a few of them in memory at a time."""
        done, patches = recorded(self.store)

        def read(chunk_id: int) -> CommittedChunk | None:
            return read_committed(self.store, chunk_id, patches[chunk_id])

        ids = (chunk.chunk_id for chunk in self.plan.chunks if chunk.chunk_id in done)
        found = read_ahead(ids, read, self.store.reads_at_once)
        return (chunk for chunk in found if chunk is not None)

    def totals(self) -> ChunkStats:
        """The counters of all committed chunks."""
        return sum((chunk.stats for chunk in self.chunks()), start=ChunkStats())

    def reopen(self) -> None:
        """Take the job's end back, so that patches may be committed."""
        self.store.delete(layout.SUCCESS, missing_ok=True)

    def discard(self, attempt: Attempt) -> None:
        """Remove an attempt's files."""
        for path in attempt.paths:
            self.store.delete(path, missing_ok=True)

    def clean_attempts(self) -> None:
        """Remove what an earlier run left without a record; call it once, before the first lease.

        What it left with a record is made durable first: it may have been killed before that.

        That is every attempt, every temporary file, every published part whose record was never
        written, every errors part that a patch has taken the place of, every patch of a chunk that
        has lost its own record, and a `_SUCCESS` that no longer holds because a chunk lacks its
        record.
        """
        for folder in (*_FOLDERS, layout.LEARNED_DIR):
            self.store.settle(folder)
        done, patches = recorded(self.store)
        self._remove_attempts()
        for folder in ("", *_FOLDERS):
            for name in self.store.names(folder):
                if is_temporary(name) or _is_left_over(folder, name, done, patches):
                    self.store.delete(f"{folder}/{name}".lstrip("/"), missing_ok=True)
        if len(done) < len(self.plan.chunks):
            self.store.delete(layout.SUCCESS, missing_ok=True)

    def finish(self, run_info: dict[str, Any]) -> dict[str, Any]:
        """Verify the whole output and write `_SUCCESS`, last of all; call it without replicas.

        Args:
            run_info: what the run wants to leave beside the counts; JSON types.

        Returns:
            What `_SUCCESS` holds.

        Raises:
            VerifyFailedError: a row is not accounted for, or a part is damaged.
        """
        self.check_lock()
        self._remove_attempts()
        report = verify_parts(self.store, self.plan)
        if report.problems:
            raise VerifyFailedError(self.store.text, report.problems, bool(report.damaged))
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
            data_path=attempt.data_path and layout.data_part(chunk_id, attempt.patch),
            errors_path=attempt.errors_path and layout.errors_part(chunk_id, attempt.patch),
        )
        return CommitRecord(self.plan.run_id, self.plan.fingerprint, published, time.time())

    def _publish(self, path: str | None, part: str, sha256: str | None) -> None:
        """Put one file, or its absence, under its final name."""
        if path is None:
            # An earlier attempt of this chunk may have been published and never recorded.
            self.store.delete(part, missing_ok=True)
            return
        try:
            self.store.publish(path, part)
        except FileNotFoundError:
            if not self.store.exists(part) or self.store.sha256(part) != sha256:
                raise JobFailedError(f"{self.store.text}: attempt file {path} is gone") from None

    def _remove_attempts(self) -> None:
        """Remove what dead replicas began or nobody took."""
        for name in self.store.list(layout.ATTEMPTS_DIR):
            self.store.delete(f"{layout.ATTEMPTS_DIR}/{name}", missing_ok=True)

    def _expected(self, attempt: Attempt, chunk: Chunk) -> tuple[int, str]:
        """Number and digest of the rows that an attempt has to account for."""
        if not attempt.patch:
            return chunk.num_rows, chunk.id_digest
        rel = layout.errors_part(chunk.chunk_id, attempt.patch - 1)
        try:
            with self.store.open_input(rel) as source:
                ids = pq.read_table(source, columns=["row_id"]).column("row_id").to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise JobFailedError(f"{self.store.text}: {rel}: cannot be read: {error}") from error
        return len(ids), ids_digest(ids)

    def _drop_superseded(self, attempt: Attempt) -> None:
        """Remove the errors part that a committed patch has taken the place of."""
        if attempt.patch:
            rel = layout.errors_part(attempt.chunk_id, attempt.patch - 1)
            self.store.delete(rel, missing_ok=True)


def _is_left_over(folder: str, name: str, done: set[int], patches: Mapping[int, int]) -> bool:
    """Whether a part, or a patch's record, is one that no commit record vouches for any more."""
    is_record = folder == layout.COMMITS_DIR
    key = layout.record_key(name) if is_record else layout.part_key(name)
    if key is None or (is_record and not key[1]):
        return False
    chunk_id, patch = key
    last = patches.get(chunk_id, 0)
    is_superseded = folder == layout.ERRORS_DIR and patch < last
    return chunk_id not in done or patch > last or is_superseded


def _check_attempt(
    attempt: Attempt, chunk: Chunk, expected: tuple[int, str], num_samples: int
) -> None:
    """Check that an attempt's counts are those of its rows.

    Raises:
        JobFailedError: names the count that differs.
    """
    num_rows, id_digest = expected
    facts = [
        ("rows", attempt.rows_ok + attempt.rows_error, num_rows),
        ("generations", attempt.generations, attempt.rows_ok * num_samples),
        ("id digest", attempt.id_digest, id_digest),
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
