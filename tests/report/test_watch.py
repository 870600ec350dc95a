from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from eevp_batch.report.watch import EVERY_S, status_view, watch
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.status import Status, read_status
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, attempt_chunk, make_spec, write_input


class Job:
    """A job that commits its chunks while somebody watches, one at every look."""

    def __init__(self, folder: Path) -> None:
        ids = [f"row-{number}" for number in range(12)]
        self.spec = make_spec(write_input(folder / "in.parquet", ids))
        self.store = Store.open(folder / "out")
        self.plan = open_plan(self.store, make_plan(self.spec, MODEL), "version: 1\n")
        self.committer = Committer(self.store, self.plan)
        self.left = list(self.plan.chunks)
        self.slept: list[float] = []
        self.lock = contextlib.ExitStack()

    def start(self) -> Job:
        """Hold the folder, as a coordinator does."""
        self.lock.enter_context(self.committer.lock())
        return self

    def read(self) -> Status:
        return read_status(self.store)

    def sleep(self, seconds: float) -> None:
        """Go on with the job instead; nothing left to do ends it."""
        self.slept.append(seconds)
        if self.left:
            chunk = self.left.pop(0)
            self.committer.commit(attempt_chunk(self.store, self.plan, self.spec, chunk), 1)
        else:
            self.committer.finish({"replicas": 1})
            self.lock.close()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_terminal_shows_the_job_until_it_is_done(job: Job) -> None:
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=80, height=40)
    watch(job.start().read, console, job.sleep)
    text = console.export_text()
    assert "running" in text and "done" in text
    assert "33.3 %" in text and "100.0 %" in text and "3 of 3" in text
    assert "tokens by exit layer" in text and "█" in text
    assert len(job.slept) == 4 and min(job.slept) >= EVERY_S


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_view_fits_the_terminal(job: Job, width: int) -> None:
    for _ in range(3):
        job.sleep(0.0)
    console = Console(file=io.StringIO(), width=width)
    console.print(status_view(job.read(), width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("█" in line for line in lines) == 3, "a line for each exit layer"


def test_elsewhere_a_line_is_printed_for_every_change(job: Job) -> None:
    console = Console(file=io.StringIO(), record=True, force_terminal=False, width=80)
    watch(job.start().read, console, job.sleep)
    lines = console.export_text().splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "running, 0 of 12 rows (0.0 %)",
        "running, 4 of 12 rows (33.3 %)",
        "running, 8 of 12 rows (66.7 %)",
        "running, 12 of 12 rows (100.0 %)",
        "done, 12 of 12 rows (100.0 %)",
    ]


def test_ending_the_watch_does_not_end_in_an_error(job: Job) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), force_terminal=False)
    watch(job.read, console, interrupted)
    assert "0 of 12 rows" in console.file.getvalue()
