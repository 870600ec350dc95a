"""Which rows of a chunk a task runs, and which it only accounts for. Knows no Ray and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.bisection import SetAside
from eevp_batch.errors import ReplicaDiedError
from eevp_batch.records import RowFailure, RowId
from eevp_batch.storage.patches import read_failures
from eevp_batch.storage.store import Store

_REASON_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a chunk, by their numbers in it.

    Attributes:
        run: those to run.
        settled: error rows that are not run.
        attempts: how often a row had been tried before this run; none where it had not been.
    """

    run: list[int]
    settled: dict[int, RowFailure] = field(default_factory=dict)
    attempts: dict[RowId, int] = field(default_factory=dict)

    @property
    def accounted(self) -> list[int]:
        """Every row that the attempt has to account for by itself."""
        return sorted({*self.run, *self.settled})

    def failures(self, found: Sequence[RowFailure]) -> list[RowFailure]:
        """All error rows of the attempt.

        Args:
            found: those among the rows that were run.
        """
        ours = [replace(f, attempts=f.attempts + self.attempts.get(f.row_id, 0)) for f in found]
        return [*ours, *self.settled.values()]


def select_rows(store: Store, task: ChunkTask, ids: Sequence[RowId]) -> Selection:
    """Find the rows of a task.

    Args:
        store: output folder.
        task: what is to be done.
        ids: of the chunk's rows.

    Raises:
        JobFailedError: the error rows to try again cannot be read.
    """
    patch = task.patch
    if patch is None:
        return _selected(task, ids, list(range(len(ids))), {})
    before = {failure.row_id: failure for failure in read_failures(store, patch)}
    tried = [number for number, row_id in enumerate(ids) if row_id in before]
    about = [number for number in tried if before[ids[number]].error_class in patch.retried]
    selection = _selected(task, ids, about, {f.row_id: f.attempts for f in before.values()})
    if task.is_whole:
        left = set(tried) - set(about)
        selection.settled.update({number: before[ids[number]] for number in left})
    return selection


def _selected(
    task: ChunkTask, ids: Sequence[RowId], about: list[int], attempts: dict[RowId, int]
) -> Selection:
    """The task's span of the rows that it is about."""
    selection = Selection(about[slice(*(task.span or (None,)))], attempts=attempts)
    for aside in task.set_aside if task.is_whole else ():
        row_id = ids[about[aside.number]]
        selection.settled[about[aside.number]] = _given_up(aside, row_id, attempts.get(row_id, 0))
    return selection


def _given_up(aside: SetAside, row_id: RowId, earlier: int) -> RowFailure:
    reason = aside.reason.splitlines()[0] if aside.reason else "no reason known"
    return RowFailure(
        row_id=row_id,
        error_class=ReplicaDiedError.__name__,
        message=f"{aside.deaths} replicas in a row died while they held this row and nothing else; "
        f"the last one: {reason[:_REASON_LENGTH]}",
        attempts=earlier + aside.deaths,
    )


def take_rows(source: Any, numbers: list[int]) -> Any:
    """Some rows of a table."""
    return source.take(pa.array(numbers, pa.int64()))
