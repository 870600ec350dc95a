"""SIGKILL while a job learns its exits, at every stage; the same job again comes to a good end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.learning_jobs import (
    LEARN_ROWS,
    NUM_ROWS,
    STAGES,
    assert_phases_are_told,
    learning_job,
    save_shallow_model,
)
from tests.plain_output import committed_parts, events, read_rows
from tests.real_jobs import command, finished, run_in_process
from tests.test_killed_job import wait_for, watching

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shallow_model(tmp_path_factory.mktemp("models") / "shallow")


@pytest.fixture(scope="module")
def expected(shallow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Token ids by row id of the job that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_in_process(learning_job(folder, shallow_model))
    assert events(folder / "out", "exits_learned"), "it learned its exits"
    return {row["row_id"]: row["token_ids"] for row in read_rows(folder / "out")}


def assert_whole(out: Path, expected: dict[str, list[int]]) -> None:
    """All rows are there with the right tokens; the phases are consistent; exits were learned."""
    rows = read_rows(out)
    assert len(rows) == NUM_ROWS, "every row is there once"
    assert {row["row_id"]: row["token_ids"] for row in rows} == expected, (
        "these exits change nothing, whenever they are learned"
    )
    counts = assert_phases_are_told(out)
    assert counts["full"] >= LEARN_ROWS
    assert len(list((out / "_eevp" / "learned").iterdir())) == 3, "one folder of exits is left"
    assert not verify(Store.open(out)).problems


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stage", STAGES)
def test_a_driver_that_is_killed_while_it_learns_is_resumed(
    stage: str, expected: dict[str, list[int]], shallow_model: Path, tmp_path: Path
) -> None:
    job, out = learning_job(tmp_path, shallow_model), tmp_path / "out"
    driver = command("submit", job)
    try:
        wait_for(lambda: STAGES[stage](out) or driver.poll() is not None)
    finally:
        driver.kill()
    code, _, stderr = finished(driver)
    assert code == -signal.SIGKILL, f"the driver ended before it could be killed: {stderr}"
    before = committed_parts(out)
    learned = out / "_eevp" / "learned.json"
    text = learned.read_text() if learned.exists() else None
    run_in_process(job)
    assert before.items() <= committed_parts(out).items(), "a committed part was touched"
    assert text in (None, learned.read_text()), "what was learned is not learned again"
    assert_whole(out, expected)


@pytest.mark.timeout(180)
def test_a_replica_that_is_killed_while_it_learns_is_followed_by_another(
    expected: dict[str, list[int]], shallow_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = learning_job(tmp_path, shallow_model, cluster={"replicas": 2, "cpus_per_replica": 1})

    def kill() -> None:
        started = wait_for(lambda: events(out, "learning_started"))[0]
        pids = {e["replica"]: e["pid"] for e in events(out, "replica_ready")}
        os.kill(pids[started["replica"]], signal.SIGKILL)

    with watching(kill):
        result = run_in_process(job)
    assert result.recoveries.replica_deaths == 1
    dead = events(out, "replica_dead")[0]["replica"]
    assert events(out, "learning_started")[0]["replica"] == dead, "it died while it learned"
    assert_whole(out, expected)
