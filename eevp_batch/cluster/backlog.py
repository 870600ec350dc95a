"""What is left of a run: which chunks, or patches of chunks, and what a lease of one asks for.

Puts leases and bisections together; knows no Ray and no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eevp_batch.cluster.bisection import Bisection, SetAside, Span, row_deaths
from eevp_batch.cluster.leases import Lease, LeaseTable
from eevp_batch.cluster.news import News
from eevp_batch.records import Phase
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.patches import Patch
from eevp_batch.storage.plan import Chunk, Plan


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """What a replica is to do under a lease.

    Attributes:
        patch: the error rows to try again; None: the task is about all rows of the chunk.
        span: which of the task's rows to run now; None: all of them.
        is_whole: whether the attempt is to account for everything that the task is about; the next
            two count only then.
        pieces: attempts at other spans.
        set_aside: rows that become error rows without being run.
    """

    chunk: Chunk
    patch: Patch | None = None
    span: Span | None = None
    is_whole: bool = True
    pieces: tuple[Attempt, ...] = ()
    set_aside: tuple[SetAside, ...] = ()


class Backlog:
    """The chunks that a run has to commit.

    Args:
        plan: the job's chunks.
        chunk_ids: those to do, as they are to be leased; read lazily.
        num_chunks: how many ids `chunk_ids` yields.
        max_attempts: `run.max_attempts`.
        patches: by chunk, where a run is about error rows only.

    Attributes:
        leases: who works on what.
        num_chunks: as given.
    """

    def __init__(
        self,
        plan: Plan,
        chunk_ids: Iterable[int],
        num_chunks: int,
        max_attempts: int,
        patches: Mapping[int, Patch] | None = None,
    ) -> None:
        self._plan, self._patches = plan, patches or {}
        self._row_deaths = row_deaths(max_attempts)
        self._bisections: dict[int, Bisection] = {}
        self.leases = LeaseTable(chunk_ids, num_chunks)
        self.num_chunks = num_chunks

    @classmethod
    def retry(cls, plan: Plan, patches: Mapping[int, Patch], max_attempts: int) -> Backlog:
        """The backlog of a run that only makes patches."""
        return cls(plan, sorted(patches), len(patches), max_attempts, patches)

    @property
    def is_retry(self) -> bool:
        """Whether the run only makes patches."""
        return bool(self._patches)

    @property
    def retried_rows(self) -> int:
        """Error rows that the run tries again."""
        return sum(patch.num_rows for patch in self._patches.values())

    def num_rows(self, chunk_id: int) -> int:
        """Rows that the chunk's task is about."""
        patch = self._patches.get(chunk_id)
        return patch.num_rows if patch else self._plan.chunks[chunk_id].num_rows

    def superseded(self, chunk_id: int) -> Counter[str]:
        """Error rows, by class, that the commit of the chunk takes the place of."""
        patch = self._patches.get(chunk_id)
        return patch.error_classes if patch else Counter()

    def lease(self, replica: str, phase: Phase) -> tuple[Lease, ChunkTask] | None:
        """Lease what is next to `replica`; None where it gets nothing now."""
        lease = self.leases.lease(replica, phase)
        if lease is None:
            return None
        chunk_id = lease.chunk_id
        task = self._task(chunk_id)
        if not lease.is_alone:
            return lease, task
        suspect = self._bisections.get(chunk_id)
        if suspect is None:
            suspect = Bisection(self.num_rows(chunk_id), self._row_deaths)
            self._bisections[chunk_id] = suspect
        return lease, ChunkTask(
            chunk=task.chunk,
            patch=task.patch,
            span=suspect.span,
            is_whole=suspect.is_last,
            pieces=tuple(suspect.pieces),
            set_aside=tuple(suspect.set_aside),
        )

    def copy(self, lease: Lease, replica: str) -> tuple[Lease, ChunkTask]:
        """Lease a chunk that may be copied to a second replica as well."""
        return self.leases.copy(lease, replica), self._task(lease.chunk_id)

    def _task(self, chunk_id: int) -> ChunkTask:
        return ChunkTask(self._plan.chunks[chunk_id], self._patches.get(chunk_id))

    def take_piece(self, lease: Lease, attempt: Attempt) -> bool:
        """Keep an attempt that is only a piece of its chunk; False where it is the whole.

        Raises:
            StaleAttemptError: the lease is not the current one of its chunk.
        """
        suspect = self._bisections.get(lease.chunk_id)
        if suspect is None or suspect.is_last:
            return False
        self.leases.put_back(lease)
        suspect.finished(attempt)
        return True

    def commit(self, lease: Lease) -> list[Attempt]:
        """Settle a lease whose attempt is committed.

        Returns:
            The pieces that went into it, whose files are no longer needed.

        Raises:
            StaleAttemptError: the lease is not the current one of its chunk.
        """
        self.leases.commit(lease)
        suspect = self._bisections.pop(lease.chunk_id, None)
        return suspect.pieces if suspect else []

    def release(self, replica: str, reason: str) -> tuple[list[Lease], list[News]]:
        """Take back what a replica held that died of `reason`.

        Returns:
            The leases, and what is to be told of a row that is given up for it.
        """
        returned, news = self.leases.release(replica), []
        for lease in returned:
            row = self._bisections[lease.chunk_id].died(reason) if lease.is_alone else None
            if row is not None:
                text = f"a row of chunk {lease.chunk_id:05d} kills replicas: it is set aside"
                fields = {"chunk_id": lease.chunk_id, "number": row.number, "deaths": row.deaths}
                news.append(News("row_set_aside", text, fields))
        return returned, news
