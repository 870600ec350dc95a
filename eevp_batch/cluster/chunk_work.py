"""One chunk on its way through an engine: which samples are still to come, and what has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from eevp_batch.errors import EngineError
from eevp_batch.records import Generation, Prompt, RowFailure, RowId


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """All that became of a chunk's rows: each row in one of the two lists."""

    generations: list[Generation]
    failures: list[RowFailure]


class ChunkWork:
    """A chunk on its way through the engine.

    Args:
        key: unique among the chunks of a loop; travels as `Prompt.tag`.
        prompts: every sample of every row that could be encoded, in row order.
        failures: the rows that could not.
    """

    def __init__(self, key: int, prompts: Sequence[Prompt], failures: Sequence[RowFailure]) -> None:
        self.key = key
        self.future: Future[ChunkResult] = Future()
        self.prompts = prompts
        self._samples_left = Counter(prompt.row_id for prompt in prompts)
        self._generations: list[Generation] = []
        self._failures = {failure.row_id: failure for failure in failures}
        self._num_rows = len(self._samples_left) + len(self._failures)

    @property
    def num_failed(self) -> int:
        return len(self._failures)

    @property
    def num_finished(self) -> int:
        """Rows all of whose samples are settled, those without a prompt included."""
        return self._num_rows - len(self._samples_left)

    @property
    def is_finished(self) -> bool:
        return not self._samples_left

    def has_failed(self, row_id: RowId) -> bool:
        """Whether a sample of the row failed, so that its other samples are no longer wanted."""
        return row_id in self._failures

    def settle(self, row_id: RowId, result: Generation | RowFailure | None) -> bool:
        """Count one sample of a row in; None when it was dropped. True when the row is finished.

        Raises:
            EngineError: the chunk does not wait for a sample of this row.
        """
        if row_id not in self._samples_left:
            raise EngineError(f"the engine gave a result that nobody waits for: row {row_id!r}")
        if isinstance(result, RowFailure):
            self._failures.setdefault(row_id, result)
        elif result is not None:
            self._generations.append(result)
        self._samples_left[row_id] -= 1
        if self._samples_left[row_id]:
            return False
        del self._samples_left[row_id]
        return True

    def finish(self) -> None:
        """Hand the result to whoever waits. The other samples of a failed row are dropped."""
        kept = [g for g in self._generations if not self.has_failed(g.row_id)]
        self.future.set_result(ChunkResult(kept, list(self._failures.values())))
