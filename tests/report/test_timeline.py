from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.report import timeline
from eevp_batch.report.time_bins import TimeBins
from eevp_batch.report.timeline import Segment, Timeline, read_timeline
from eevp_batch.storage.status import read_events
from eevp_batch.storage.store import Store
from tests.report.outputs import EVIL, write_events


@pytest.fixture
def told(tmp_path: Path) -> Timeline:
    store = Store.open(tmp_path)
    write_events(store)
    return read_timeline(read_events(store))


def test_a_pause_between_two_runs_is_left_out(told: Timeline) -> None:
    assert [(run.start_s, run.stop_s) for run in told.runs] == [(0, 25), (25, 85)]
    assert [run.end for run in told.runs] == [None, "job_finished"], "the first run was killed"
    assert told.working_s == (20 - 10) + (55 - 5), "from each run's readiness to its last commit"


def test_a_replicas_states_follow_one_another(told: Timeline) -> None:
    dead = Segment("dead", 25, 25)  # the run ended then: without length, but seen
    assert told.replicas["replica-1"] == [
        Segment("starting", 0, 10),
        Segment("busy", 10, 25),
        dead,
    ]
    first = told.replicas["replica-0"]
    assert first[:4] == [
        Segment("starting", 0, 10),
        Segment("busy", 10, 20),
        Segment("waiting", 20, 25),
        Segment("starting", 25, 30),
    ]
    assert [s.start_s for s in first[1:]] == [s.stop_s for s in first[:-1]], "without a gap"
    assert told.seconds["busy"] == (10 + 5 * 5) + 15


def test_a_death_is_told_with_what_it_cost(told: Timeline) -> None:
    (death,) = told.deaths
    assert (death.at_s, death.replica, death.chunks) == (25, "replica-1", 1)
    assert death.reason == EVIL and told.num_deaths == 1


def test_a_dead_replica_is_dead_until_it_is_ready_again() -> None:
    kinds = ["job_started", "replica_ready", "replica_dead", "replica_ready", "job_finished"]
    events = [{"event": k, "unix_s": 10.0 * n, "replica": "r"} for n, k in enumerate(kinds)]
    states = [segment.state for segment in read_timeline(events).replicas["r"]]
    assert states == ["starting", "waiting", "dead", "waiting"]


def test_learning_lasts_until_exits_are_learned() -> None:
    kinds = ["job_started", "replica_ready", "learning_started", "exits_learned", "job_finished"]
    events = [
        {"event": kind, "unix_s": 10.0 * n} | ({} if n == 3 else {"replica": "r"})
        for n, kind in enumerate(kinds)
    ]
    states = [segment.state for segment in read_timeline(events).replicas["r"]]
    assert states == ["starting", "waiting", "learning", "waiting"]


def test_all_tokens_and_rows_of_commits_are_counted(told: Timeline) -> None:
    assert sum(told.tokens.sums) == pytest.approx(600)
    assert told.rows.running_totals()[-1] == (80, 24)


def test_rows_that_are_done_again_are_counted_once_and_a_retry_is_a_run_of_its_own() -> None:
    def commit(unix_s: float, chunk_id: int) -> dict[str, object]:
        done = {"event": "chunk_committed", "unix_s": unix_s, "replica": "r", "chunk_id": chunk_id}
        return done | {"rows_ok": 9, "rows_error": 1, "generated_tokens": 5}

    found = read_timeline(
        [
            {"event": "job_started", "unix_s": 0.0},
            *(commit(10.0 + chunk_id, chunk_id) for chunk_id in range(3)),
            {"event": "job_finished", "unix_s": 20.0},
            {"event": "chunk_set_aside", "unix_s": 5_000.0, "chunk_id": 1},
            {"event": "job_resumed", "unix_s": 5_001.0},
            commit(5_010.0, 1),
            {"event": "job_finished", "unix_s": 5_011.0},
            {"event": "retry_started", "unix_s": 90_000.0},
            commit(90_030.0, 2) | {"rows_ok": 1, "rows_error": 0},
            {"event": "job_finished", "unix_s": 90_040.0},
        ]
    )
    assert sum(found.rows.sums) == 30 and sum(found.tokens.sums) == 25
    assert [run.is_retry for run in found.runs] == [False, False, True]
    assert found.end_s == pytest.approx(20 + 10 + 40), "pauses are left out"


def test_a_log_that_says_nothing_makes_no_story() -> None:
    for events in ([], [{"event": "job_started"}], [{"event": "job_started", "unix_s": "soon"}]):
        found = read_timeline(events)
        assert found.working_s is None and found.end_s == 0 and not found.replicas


def test_a_replica_that_changes_often_keeps_few_segments() -> None:
    events = [{"event": "job_started", "unix_s": 0.0}]
    for number in range(5000):
        chunk = {"replica": "r", "chunk_id": number}
        events.append({"event": "chunk_leased", "unix_s": number + 0.2, **chunk})
        events.append({"event": "chunk_committed", "unix_s": number + 0.7, **chunk})
    found = read_timeline(events)
    segments = found.replicas["r"]
    assert len(segments) <= timeline.MAX_SEGMENTS + 1
    assert segments[0].start_s == pytest.approx(0.2) and segments[-1].stop_s >= 4999
    assert found.seconds["busy"] == pytest.approx(2500), "the sums are exact all the same"


SPANS = st.lists(
    st.tuples(st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0, 1e4)), min_size=1, max_size=30
)


@given(SPANS)
def test_bins_hold_every_amount_once(spans: list[tuple[float, float, float]]) -> None:
    bins = TimeBins()
    for start_s, length_s, amount in spans:
        bins.add(start_s, start_s + length_s, amount)
    total = sum(amount for _, _, amount in spans)
    assert sum(bins.sums) == pytest.approx(total, rel=1e-6, abs=1e-6)
    assert len(bins.sums) <= bins.max_bins
    end_s, counted = bins.running_totals()[-1]
    assert end_s == bins.end_s == max(start + length for start, length, _ in spans)
    assert counted == pytest.approx(total, rel=1e-6, abs=1e-6)


def test_a_replica_that_left_is_neither_busy_nor_dead() -> None:
    kinds = ["job_started", "replica_placed", "replica_ready", "chunk_leased", "chunk_leased"]
    kinds += ["chunk_given_up", "replica_left", "replica_placed", "job_finished"]
    chunks = {3: {"chunk_id": 0}, 4: {"chunk_id": 1}, 5: {"chunk_id": 0}}
    names = {0: {}, 7: {"replica": "r.2"}, 8: {}}
    events = [
        {"event": kind, "unix_s": 10.0 * n} | names.get(n, {"replica": "r"}) | chunks.get(n, {})
        for n, kind in enumerate(kinds)
    ]
    found = read_timeline(events)
    assert found.replicas["r"] == [
        Segment("starting", 10, 20),
        Segment("waiting", 20, 30),
        Segment("busy", 30, 60),
    ]
    assert found.replicas["r.2"] == [Segment("starting", 70, 80)], "from when it had a place"
    assert found.num_deaths == found.discarded == 0
