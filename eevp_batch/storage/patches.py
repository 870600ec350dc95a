"""Error rows that are tried again: which ones, and what a patch of a chunk has to account for.

How a patch is committed, step by step; a crash between any two steps loses nothing, for the record
alone decides which files count, and `Committer.clean_attempts` removes the others:

1. `_SUCCESS` is removed: the job is open again.
2. A replica writes the patch as an attempt: the rows that came out this time, and *all* rows that
   the chunk then has in error, those that were not tried again among them.
3. Both files are published beside the chunk's own, as `part-00012.r1.parquet`.
4. `commits/00012.r1.json` is created exclusively: the commit point. From here on the errors part of
   before counts no more.
5. That errors part is deleted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.errors import JobFailedError, RowSkippedError
from eevp_batch.records import RowFailure
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.store import Store


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch to be made.

    Attributes:
        number: 1 for the first patch of its chunk.
        errors_path, errors_sha256: the errors part that it takes the place of.
        error_classes: of all rows in there.
        retried: the classes whose rows are tried again.
    """

    chunk_id: int
    number: int
    errors_path: str
    errors_sha256: str | None
    error_classes: Counter[str]
    retried: frozenset[str]

    @property
    def num_rows(self) -> int:
        """Rows that are tried again."""
        return sum(self.error_classes[name] for name in self.retried)


def find_patches(committer: Committer, classes: Sequence[str] = ()) -> Iterator[Patch]:
    """The patches that try error rows again, one for each committed chunk that has some.

    Args:
        committer: of the job.
        classes: names of the error classes whose rows are tried again; none: all but skipped rows.
    """
    for chunk in committer.chunks():
        counts, last = chunk.stats.error_classes, chunk.last
        retried = set(classes) or set(counts) - {RowSkippedError.__name__}
        if last.errors_path is not None and retried & set(counts):
            yield Patch(
                chunk_id=last.chunk_id,
                number=last.patch + 1,
                errors_path=last.errors_path,
                errors_sha256=last.errors_sha256,
                error_classes=counts,
                retried=frozenset(retried & set(counts)),
            )


def read_failures(store: Store, patch: Patch) -> list[RowFailure]:
    """The error rows that a patch takes the place of.

    Raises:
        JobFailedError: the errors part is gone or was altered.
    """
    try:
        content = store.read(patch.errors_path)
        if hashlib.sha256(content).hexdigest() != patch.errors_sha256:
            raise JobFailedError(f"{store.text}: {patch.errors_path}: the file was altered")
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        text = f"{store.text}: {patch.errors_path}: cannot be read: {error}"
        raise JobFailedError(text) from error
    names = ("row_id", "error_class", "message", "attempts")
    return [RowFailure(**{name: row[name] for name in names}) for row in rows]
