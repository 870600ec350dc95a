"""`submit` with input and output on S3: a bad network, two coordinators, a killed one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from eevp_batch.errors import UsageError
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.real_jobs import command, finished, run_in_process
from tests.s3_server import ENVIRONMENT, Fault, S3Server, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_ROWS = 48
FAULTS: tuple[Fault, ...] = ("500", "503", "lost", "cut")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server:
        yield server


def make_job(folder: Path, s3: S3Server, model: Path) -> Path:
    sink = pa.BufferOutputStream()
    prompts = [f"word {row} and " * (1 + row % 5) for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": list(range(NUM_ROWS)), "prompt": prompts}), sink)
    Store.open(s3.uri("in")).write("some prompts.parquet", sink.getvalue().to_pybytes())
    fields = {
        "version": 1,
        "name": "s3",
        "input": {"path": s3.uri("in/*.parquet")},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {"layers": [2, 4], "threshold": 0.3},
        "sampling": {"max_new_tokens": 64},
        "engine": {"max_resident": 4},
        "run": {"chunk_rows": 4},
        "output": {"path": s3.uri("out #1")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_job_on_s3(s3: S3Server, tiny_llama: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, s3, tiny_llama)
    out = Store.open(s3.uri("out #1"))
    s3.faults.at_random(0.03, FAULTS, 1)
    # The job stands still there for as long as the others look at it.
    s3.faults.plan("PUT", "commits/00003", *["503"] * 10_000)
    driver = command("submit", job)
    while not out.list("_eevp/commits"):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    assert read_status(out).state == "running"
    with pytest.raises(UsageError, match=f"another process is running .* process {driver.pid} on"):
        run_in_process(job)
    assert driver.poll() is None, "the second one has not disturbed the first"
    driver.kill()
    driver.communicate()
    assert "00003.json" not in out.list("_eevp/commits")
    assert read_status(out).state == "interrupted", "that its process is dead is seen at once"
    s3.faults.heal()
    s3.faults.at_random(0.03, FAULTS, 2)
    code, _, stderr = finished(command("submit", job))
    assert code == 0, stderr
    assert s3.faults.injected, "the network failed now and then"
    s3.faults.heal()
    assert verify(out).problems == []
    assert out.list("_eevp/attempts") == []
    assert read_status(out).state == "done"
    assert os.listdir(tmp_path) == ["job.yaml"], "nothing was written anywhere else"
