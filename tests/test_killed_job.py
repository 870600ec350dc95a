"""SIGKILL in the middle of a job with a real, tiny engine: the output is the undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.plain_output import Rows, committed_parts, events, leased_again, read_rows
from tests.real_jobs import command, finished, run_in_process, write_job

pytestmark = pytest.mark.ray

Found = TypeVar("Found")
NUM_ROWS, CHUNK_ROWS = 96, 4
NUM_CHUNKS = NUM_ROWS // CHUNK_ROWS
# A score of 8 has steps of 2^-5 in bfloat16, each of which moves a margin by 0.016 at most.
ROUNDING = {"bfloat16": 0.016, "float32": 1e-5}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "that", "sleeps")


def make_job(folder: Path, model: Path, dtype: str) -> Path:
    """A job that a replica works at for seconds: few rows at a time, many tokens each."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [" ".join(WORDS[row % 7 : row % 7 + 1 + row % 6]) for row in range(NUM_ROWS)]
    table = pa.table({"id": [f"q{row:02}" for row in range(NUM_ROWS)], "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    fields = {
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": dtype},
        "exit": {"layers": [2, 4], "threshold": 0.3},
        "sampling": {"max_new_tokens": 96},
        "engine": {"max_resident": 4},
        "cluster": {"replicas": 2},
        "run": {"chunk_rows": CHUNK_ROWS},
    }
    return write_job(folder, fields)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(
    dtype: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The output, by row id, of the job that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_in_process(make_job(folder, tiny_llama, dtype))
    assert result.recoveries.replica_deaths == 0, "nothing happened to it"
    rows = {row["row_id"]: row for row in read_rows(folder / "out")}
    layers = {layer for row in rows.values() for layer in row["exit_layers"]}
    assert layers == {2, 4, 6}, "tokens leave at every exit, so that the exits are compared too"
    return rows


def assert_same(found: Rows, expected: dict[str, dict[str, Any]], dtype: str) -> None:
    """Every column is equal, confidences to rounding, but the one that counts attempts."""
    assert len(found) == len(expected) == NUM_ROWS, "every row is there once"
    for row in found:
        other, name = expected[row["row_id"]], row["row_id"]
        exact = other.keys() - {"attempt", "exit_confidences"}
        different = sorted(column for column in exact if row[column] != other[column])
        assert not different, f"row {name} differs in {different} from the undisturbed run"
        assert row["exit_confidences"] == pytest.approx(
            other["exit_confidences"], rel=0, abs=ROUNDING[dtype]
        ), f"the confidences of row {name} are those of the undisturbed run, to rounding"


def wait_for(look: Callable[[], Found | None], timeout_s: float = 90.0) -> Found:
    """Look until something is found."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, "it did not come to pass in time"
        time.sleep(0.005)
    return found


@contextmanager
def watching(watch: Callable[[], object]) -> Iterator[None]:
    """Run `watch` beside the block."""
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def busy_replica(out: Path) -> int | None:
    """Process id of a replica that holds a chunk, once three chunks are committed."""
    log = events(out)
    committed = {event["chunk_id"] for event in log if event["event"] == "chunk_committed"}
    holders = [
        event["replica"]
        for event in log
        if event["event"] == "chunk_leased" and event["chunk_id"] not in committed
    ]
    pids = {event["replica"]: event["pid"] for event in log if event["event"] == "replica_ready"}
    return pids[holders[0]] if len(committed) >= 3 and holders else None


@pytest.mark.timeout(180)
def test_a_killed_replica_changes_nothing_in_the_output(
    dtype: str, undisturbed: dict[str, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    job, out = make_job(tmp_path, tiny_llama, dtype), tmp_path / "out"

    with watching(lambda: os.kill(wait_for(lambda: busy_replica(out)), signal.SIGKILL)):
        result = run_in_process(job)
    assert result.recoveries.replica_deaths == 1, "one replica died, and was replaced"
    assert result.recoveries.chunks_returned >= 1, "it died with work under way"
    (dead,) = events(out, "replica_dead")
    held = set(dead["chunks"])
    assert leased_again(out) == held, "exactly what the dead replica held is done again"
    assert_same(read_rows(out), undisturbed, dtype)
    assert_verifies(out)


def assert_verifies(out: Path) -> None:
    code, stdout, stderr = finished(command("verify", out))
    assert code == 0, f"verify found: {stderr}"
    assert f"{NUM_ROWS} rows in = {NUM_ROWS} ok" in stdout, "every row is accounted for"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_a_killed_driver_is_resumed_by_the_same_command(
    dtype: str, undisturbed: dict[str, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    job, out = make_job(tmp_path, tiny_llama, dtype), tmp_path / "out"
    driver = command("submit", job)
    try:
        wait_for(lambda: len(committed_parts(out)) >= 3 or driver.poll() is not None)
    finally:
        driver.kill()
    code, _, stderr = finished(driver)
    assert code == -signal.SIGKILL, f"the driver ended before it could be killed: {stderr}"
    before = committed_parts(out)
    assert 3 <= len(before) < NUM_CHUNKS, "it was killed in the middle of the job"
    assert not (out / "_SUCCESS").exists(), "a job that was killed does not look done"

    code, stdout, stderr = finished(command("submit", job))
    assert code == 0, f"the same command does not go on: {stderr}"
    assert "resumes" in stderr, "the user is told that it goes on"
    assert f"{NUM_ROWS} in, {NUM_ROWS} ok" in stdout, "the summary covers both runs"
    after = committed_parts(out)
    assert len(after) == NUM_CHUNKS, "every chunk is committed now"
    assert before.items() <= after.items(), "a part that was committed before the kill was touched"
    assert_same(read_rows(out), undisturbed, dtype)
    assert_verifies(out)
    assert_a_missing_part_is_named(out, tmp_path / "copy")


def assert_a_missing_part_is_named(out: Path, copy: Path) -> None:
    """Take one part out of a copy of the output, and see what `verify` says."""
    shutil.copytree(out, copy)
    (copy / "data" / "part-00005.parquet").unlink()
    code, _, stderr = finished(command("verify", copy))
    assert code == 6, f"verify ends with {code} although a part is missing"
    assert "data/part-00005.parquet: the file is missing" in stderr, "verify names the part"
