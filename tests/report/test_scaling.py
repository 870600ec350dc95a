"""Predictions from an event log: the arithmetic, and that a pace predicts the run it is from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.errors import UsageError
from eevp_batch.report.scaling import Pace, measure_pace, predict

PACE = Pace(
    start_s=10.0, tokens_per_s=100.0, tokens_per_row=5.0, drain_s=2.0, commit_s=0.1, verify_s=0.01
)


def run_of(pace: Pace, chunks: int, rows: int, replicas: int = 1) -> list[dict[str, Any]]:
    """The event log of a run at this pace, to which the coordinator is no limit."""
    tokens = rows * pace.tokens_per_row
    chunk_s = tokens / pace.tokens_per_s
    events: list[dict[str, Any]] = [{"event": "job_started", "unix_s": 1000.0}]
    ready = 1000.0 + pace.start_s
    last = ready
    for replica in range(replicas):
        events.append({"event": "replica_ready", "unix_s": ready, "replica": f"r{replica}"})
        for number in range(chunks // replicas):
            at = ready + pace.drain_s + (number + 1) * chunk_s
            last = max(last, at)
            facts = {"generated_tokens": tokens, "rows_ok": rows, "rows_error": 0}
            events.append(
                {"event": "chunk_leased", "unix_s": at - chunk_s, "replica": f"r{replica}"}
            )
            events.append(
                {"event": "chunk_committed", "unix_s": at, "replica": f"r{replica}", **facts}
            )
    events.sort(key=lambda event: event["unix_s"])
    end = last + chunks * pace.verify_s
    return [*events, {"event": "job_finished", "unix_s": end}]


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_pace_of_a_run_predicts_that_run(replicas: int) -> None:
    events = run_of(PACE, chunks=40, rows=20, replicas=replicas)
    pace = measure_pace(events, commit_s=0.1)
    assert pace.tokens_per_s == pytest.approx(PACE.tokens_per_s, rel=0.06)
    assert pace.tokens_per_row == PACE.tokens_per_row
    found = predict(pace, rows=800, chunks=40, replicas=replicas)
    assert found.total_s == pytest.approx(events[-1]["unix_s"] - 1000.0, rel=0.02)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_more_replicas_never_take_longer_and_never_beat_their_share(
    chunks: int, replicas: int
) -> None:
    alone = predict(PACE, chunks * 8, chunks, 1)
    many = predict(PACE, chunks * 8, chunks, replicas)
    assert many.total_s <= alone.total_s
    assert many.work_s >= alone.work_s / replicas - 1e-9


def test_one_coordinator_is_the_limit_of_many_replicas() -> None:
    few, many = predict(PACE, 80_000, 1000, 4), predict(PACE, 80_000, 1000, 1000)
    assert few.limit == "replicas"
    assert (many.limit, many.work_s) == ("coordinator", pytest.approx(100.0))


def test_whole_chunks_leave_replicas_without_work() -> None:
    assert predict(PACE, 1000, 10, 4).work_s == pytest.approx(1000 * 5 / 100 * 3 / 10)


def test_a_resumed_run_counts_from_its_own_start() -> None:
    earlier = [{"event": "job_started", "unix_s": 0.0}, {"event": "job_interrupted", "unix_s": 9.0}]
    log = run_of(PACE, chunks=40, rows=20)
    resumed = [{**log[0], "event": "job_resumed"}, *log[1:]]
    assert measure_pace([*earlier, *resumed]) == measure_pace(log)


@pytest.mark.parametrize("end", [1, 3, -1])
def test_a_log_without_a_whole_run_is_refused(end: int) -> None:
    with pytest.raises(UsageError, match="found no run that committed a chunk and has ended"):
        measure_pace(run_of(PACE, chunks=40, rows=20)[:end])
