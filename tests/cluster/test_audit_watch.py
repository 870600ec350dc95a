"""What the phases of a job make of audited chunks, in one run and in a resumed one; no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.cluster.news import News
from eevp_batch.cluster.phases import Phases
from eevp_batch.records import AuditCounts, ChunkStats
from eevp_batch.report.text import drift_text
from eevp_batch.spec import AuditSpec, ExitSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, attempt_chunk, make_spec, write_input

ROWS = 8  # audited, of each chunk


def audited(diverged: int) -> AuditCounts:
    """Eight rows of 30 tokens, some of which part after ten."""
    counts = AuditCounts()
    counts.equal[30], counts.diverged[10, 30] = ROWS - diverged, diverged
    counts.distances[0], counts.distances[500] = ROWS - diverged, diverged
    return counts


GOOD, BAD = audited(0), audited(6)


class Job:
    """An audited job of one planned chunk, whose attempt is committed over and over."""

    def __init__(self, folder: Path, **audit: Any) -> None:
        source = write_input(folder / "in.parquet", ["a", "b"])
        fields = {"full_depth_fraction": 0.5, "delta": 0.01, "stop_exits": True} | audit
        exit = ExitSpec(layers=[1], threshold=0.9)
        self.spec = make_spec(source, exit=exit, audit=AuditSpec.model_validate(fields))
        self.store = Store.open(folder / "out")
        self.plan = open_plan(self.store, make_plan(self.spec, MODEL))
        self._attempt = attempt_chunk(self.store, self.plan, self.spec, self.plan.chunks[0])
        self.num_read = 0

    def attempt(self, counts: AuditCounts) -> Attempt:
        return replace(self._attempt, stats=ChunkStats(rows_ok=2, audit=counts))

    def phases(self, *before: AuditCounts) -> Phases:
        """A run after others that committed these chunks."""

        def attempts() -> Iterator[Attempt]:
            for counts in before:
                self.num_read += 1
                yield Attempt.from_json(self.attempt(counts).to_json())  # as from storage

        return Phases(self.spec, self.plan, self.store, attempts)

    def commit(self, phases: Phases, *chunks: AuditCounts) -> list[News]:
        return [news for counts in chunks for news in phases.committed(self.attempt(counts))]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_change_stops_exits_and_is_told_once_with_the_rows_since(job: Job) -> None:
    phases = job.phases()
    assert job.commit(phases, *[GOOD] * 200) == [] and phases.phase == "exits"
    (news,) = job.commit(phases, *[BAD] * 4)
    found = news.fields
    assert news.event == "audit_drift" and phases.phase == "full"
    assert ROWS <= found["rows"] <= 4 * ROWS and found["rows"] % ROWS == 0
    assert found["rows_before"] == 200 * ROWS
    low, high = found["interval"]
    assert 0.01 < low < found["disagreement"] < high
    assert f"the last {found['rows']} of {found['rows'] + 200 * ROWS:,} audited rows" in news.text
    assert f"in the last {found['rows']} of 1,6" in drift_text(found)
    assert job.phases().phase == "full", "a resumed job does not begin to trust its exits again"


def test_a_resumed_run_knows_what_earlier_runs_committed(job: Job) -> None:
    """The same chunks are told of at the same place, wherever the job was interrupted."""
    coming = [*[GOOD] * 50, *[BAD] * 4]
    (whole,) = job.commit(job.phases(), *coming)
    for done in (1, 49, 51):
        job.store.delete("_eevp/exits_stopped.json")
        phases = job.phases(*coming[:done])
        assert list(phases.start()) == [] and phases.phase == "exits"
        assert job.commit(phases, *coming[done:]) == [whole]


def test_what_a_run_could_not_tell_any_more_the_next_one_tells_at_its_start(job: Job) -> None:
    phases = job.phases(*[GOOD] * 50, *[BAD] * 4)
    assert phases.phase == "full", "no chunk is leased with exits before that"
    (news,) = phases.start()
    assert news.event == "audit_drift" and job.commit(phases, BAD) == []


@pytest.mark.parametrize("audit", [
    {"delta": None, "stop_exits": False}, {"full_depth_fraction": 0.0, "stop_exits": False},
])  # fmt: skip
def test_a_job_that_is_not_watched_reads_nothing_again(
    tmp_path: Path, audit: dict[str, Any]
) -> None:
    job = Job(tmp_path, **audit)
    phases = job.phases(*[BAD] * 9)
    assert list(phases.start()) == [] and job.num_read == 0
    assert job.commit(phases, *[BAD] * 9) == [] and phases.phase == "exits"


def test_a_run_that_learns_and_is_watched_reads_what_was_committed_once(job: Job) -> None:
    learns = ExitSpec.model_validate({"mode": "learn"})
    job.spec = job.spec.model_copy(update={"exit": learns})
    phases = job.phases(*[GOOD] * 9)
    assert job.num_read == 9 and phases.phase == "full"


def test_a_warning_without_a_stop_leaves_exits_on_and_tells_so(tmp_path: Path) -> None:
    job = Job(tmp_path, stop_exits=False)
    phases = job.phases()
    (news,) = job.commit(phases, *[BAD] * 4)
    assert phases.phase == "exits" and news.text.endswith("exits stay on")
    assert news.fields["rows_before"] == 0 and f"of {news.fields['rows']} audited" in news.text
