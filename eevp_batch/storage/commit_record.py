"""The commit record of a chunk: the file whose existence says that the chunk is done.

When error rows of a chunk are tried again, the result is a *patch*: further parts, and a further
record beside the chunk's own. It holds the rows that came out this time and, as its errors part,
every row that the chunk has left in error; the errors part before it thereby counts no more.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eevp_batch.errors import JobFailedError
from eevp_batch.records import ChunkStats
from eevp_batch.storage import layout
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.store import Store
from eevp_batch.storage.typed import typed


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What commits a chunk.

    Attributes:
        attempt: the attempt, its paths being those of the published parts.
    """

    run_id: str
    fingerprint: str
    attempt: Attempt
    committed_unix_s: float

    @property
    def chunk_id(self) -> int:
        return self.attempt.chunk_id

    @property
    def patch(self) -> int:
        return self.attempt.patch

    def to_json(self) -> str:
        """JSON text."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**values, "attempt": self.attempt.to_json()}, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CommitRecord:
        """The inverse of `to_json`.

        Raises:
            JobFailedError: the text is damaged.
        """
        try:
            data = json.loads(text)
            return typed(cls(**{**data, "attempt": Attempt.from_json(data["attempt"])}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise JobFailedError(f"damaged commit record: {error}") from error


@dataclass(frozen=True, slots=True)
class CommittedChunk:
    """All that is recorded of a chunk.

    Attributes:
        records: its own and those of its patches, oldest first.
    """

    records: tuple[CommitRecord, ...]

    @property
    def attempts(self) -> list[Attempt]:
        return [record.attempt for record in self.records]

    @property
    def last(self) -> Attempt:
        """The one whose error rows count."""
        return self.records[-1].attempt

    @property
    def stats(self) -> ChunkStats:
        """Counters of the chunk; each row in them once."""
        total = ChunkStats()
        for attempt in self.attempts:
            total = total.without_errors(total.error_classes) + attempt.stats
        return total


def recorded(store: Store) -> tuple[set[int], Counter[int]]:
    """The recorded chunks, and the patches of each, from one listing of the records' names.

    A patch counts where those before it and the chunk itself are recorded.
    """
    done: set[int] = set()
    patches: list[tuple[int, int]] = []
    for key in filter(None, map(layout.record_key, store.names(layout.COMMITS_DIR))):
        if key[1]:
            patches.append(key)
        else:
            done.add(key[0])
    counts: Counter[int] = Counter()
    for chunk_id, patch in sorted(patches):
        if chunk_id in done and patch == counts[chunk_id] + 1:
            counts[chunk_id] = patch
    return done, counts


def committed_chunks(store: Store) -> set[int]:
    """The recorded chunks, from the names of the records alone."""
    return recorded(store)[0]


def patch_counts(store: Store) -> Counter[int]:
    """Patches of each recorded chunk, from the names of the records alone."""
    return recorded(store)[1]


def read_committed(store: Store, chunk_id: int, num_patches: int) -> CommittedChunk | None:
    """A chunk's record and those of its patches; None before it is committed.

    Raises:
        JobFailedError: a record is damaged.
    """
    found = (read_record(store, chunk_id, patch) for patch in range(num_patches + 1))
    records = tuple(record for record in found if record is not None)
    return CommittedChunk(records) if len(records) == num_patches + 1 else None


def read_record(store: Store, chunk_id: int, patch: int = 0) -> CommitRecord | None:
    """The commit record of a chunk or of a patch; None before that is committed.

    Raises:
        JobFailedError: the record is damaged.
    """
    rel = layout.commit_record(chunk_id, patch)
    try:
        text = store.read(rel)
    except FileNotFoundError:
        return None
    try:
        return CommitRecord.from_json(text)
    except JobFailedError as error:
        raise JobFailedError(f"{rel}: {error}; submit --repair does the chunk again") from error
