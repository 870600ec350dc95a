"""The commit record of a chunk: the file whose existence says that the chunk is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from eevp_batch.errors import JobFailedError
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


def committed_chunks(store: Store) -> set[int]:
    """The recorded chunks, from the names of the records alone."""
    ids = (layout.record_chunk_id(name) for name in store.names(layout.COMMITS_DIR))
    return {chunk_id for chunk_id in ids if chunk_id is not None}


def read_record(store: Store, chunk_id: int) -> CommitRecord | None:
    """A chunk's commit record; None before it is committed.

    Raises:
        JobFailedError: the record is damaged.
    """
    rel = layout.commit_record(chunk_id)
    try:
        text = store.read(rel)
    except FileNotFoundError:
        return None
    try:
        return CommitRecord.from_json(text)
    except JobFailedError as error:
        raise JobFailedError(f"{rel}: {error}") from error
