"""Predictions from an event log: the arithmetic, and that a pace predicts the run it is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.cli import main
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
            facts = {"generated_tokens": round(tokens), "rows_ok": rows, "rows_error": 0}
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


def test_a_retry_does_not_change_the_pace() -> None:
    log = run_of(PACE, chunks=40, rows=20)
    again = {"event": "retry_started", "unix_s": 90_000.0}
    late = [{**event, "unix_s": 90_000.0 + event["unix_s"]} for event in log[1:]]
    assert measure_pace([*log, again, *late]) == measure_pace(log)


def test_a_plan_says_how_long_it_takes_at_the_pace_of_a_finished_job(
    tmp_path: Path, tiny_llama: Path
) -> None:
    rows = {"id": list(range(64)), "prompt": ["the fox"] * 64}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    job = tmp_path / "job.yaml"
    text = f"input: {{path: in.parquet}}\nmodel: {{path: {tiny_llama}}}\noutput: {{path: new}}\n"
    text += "sampling: {max_new_tokens: 8}\n"
    job.write_text(text + "cluster: {replicas: 3}\nrun: {chunk_rows: 4}\n")
    command = ["plan", str(job), "--from", str(tmp_path / "out")]
    missing = CliRunner().invoke(main, command)
    assert missing.exit_code == 2
    assert "out: events: found no run" in missing.stderr
    (tmp_path / "out" / "_eevp").mkdir(parents=True)
    lines = map(json.dumps, run_of(PACE, chunks=40, rows=20))
    (tmp_path / "out" / "_eevp" / "events.jsonl").write_text("\n".join(lines) + "\n")
    found = CliRunner().invoke(main, [*command, "--json"])
    assert found.exit_code == 0, found.stderr
    times = {time["replicas"]: time for time in json.loads(found.stdout)["times"]}
    assert list(times) == [1, 2, 3, 4, 8]
    assert times[1]["work_s"] == pytest.approx(64 * 5 / 100, rel=0.06)
    assert times[8]["work_s"] == pytest.approx(times[1]["work_s"] / 8)
    shown = CliRunner().invoke(main, command).stdout
    assert f"at the pace of {tmp_path}/out" in shown
    assert "replicas |       in all" in shown


@pytest.mark.parametrize("end", [1, 3, -1])
def test_a_log_without_a_whole_run_is_refused(end: int) -> None:
    with pytest.raises(UsageError, match="found no run that committed a chunk and has ended"):
        measure_pace(run_of(PACE, chunks=40, rows=20)[:end])
