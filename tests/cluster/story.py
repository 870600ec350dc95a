"""What happens to a job while it runs, and what has to be there in the end."""

from __future__ import annotations

from collections.abc import Callable

from eevp_batch.cluster.progress import Progress
from tests.cluster.jobs import Job
from tests.cluster.scripted import exits_of


class Story:
    """Things to do one after the other, each once what it waits for is in the event log."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        job.on_progress = self._look

    def once(self, is_time: Callable[[], bool], act: Callable[[], None]) -> None:
        self._steps.append((is_time, act))

    def num(self, kind: str) -> int:
        return len(self.job.events(kind))

    @property
    def is_over(self) -> bool:
        return not self._steps

    def _look(self, progress: Progress) -> None:
        if self._steps and self._steps[0][0]():
            self._steps.pop(0)[1]()


def check_whole(job: Job, num_rows: int) -> None:
    """Every row once, as its id wants it, and as the first attempt at its chunk or a later one."""
    assert not job.problems()
    assert [row["row_id"] for row in job.rows()] == list(range(num_rows))
    for row in job.rows():
        assert row["token_ids"] == [exit.token_id for exit in exits_of(row["row_id"], 0)]
