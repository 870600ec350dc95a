"""A running job is scraped as Prometheus does it, and every metric says something sensible."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from eevp_batch.cluster.idle_clock import IdleClock
from eevp_batch.cluster.jobs import run_job
from eevp_batch.cluster.local_ray import local_ray
from eevp_batch.cluster.metrics import JOB_TAGS, METRICS, REPLICA_TAGS
from eevp_batch.cluster.progress import Progress
from eevp_batch.errors import JobInterruptedError
from eevp_batch.prepare import prepare
from eevp_batch.row_counts import KeptTokens
from eevp_batch.spec_file import dump_spec
from eevp_batch.storage.plan import open_plan
from eevp_batch.vitals import EngineVitals
from tests.real_jobs import write_job

NUM_ROWS, NUM_LAYERS = 12_000, 6
EXPORTED = {name for metric in METRICS for name in metric.exported}

Series = dict[tuple[tuple[str, str], ...], float]


class Scraper:
    """Reads the endpoints of all nodes; what it has seen last of each series is kept.

    Attributes:
        found: value by tags of ours, by name.
    """

    def __init__(self) -> None:
        self.found: dict[str, Series] = {}

    @property
    def missing(self) -> set[str]:
        return EXPORTED - set(self.found)

    def scrape(self) -> None:
        for node in ray.nodes():
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    self._take(answer.read().decode())
            except OSError:
                continue  # the agent is still starting, or busy

    def values(self, name: str, tag: str | None = None) -> dict[str, float]:
        """Sum over all series by one tag; by nothing without one."""
        sums: dict[str, float] = {}
        for tags, value in self.found[f"ray_eevp_{name}"].items():
            key = dict(tags)[tag] if tag else ""
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def _take(self, text: str) -> None:
        ours = {key: metric for metric in METRICS for key in metric.exported}
        lines = (line for line in text.splitlines() if "ray_eevp_" in line)
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                metric = ours.get(sample.name)
                if metric is None:
                    continue
                missing = set(metric.tags) - set(sample.labels)
                assert not missing, f"{sample.name} has no tag {missing}"
                kept = {*metric.tags, "WorkerId", "le"}
                tags = tuple(sorted((k, v) for k, v in sample.labels.items() if k in kept))
                self.found.setdefault(sample.name, {})[tags] = sample.value


@pytest.fixture
def quick_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that passes metrics on twice a second instead of every ten."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    with local_ray(num_cpus=1, dashboard=False):
        yield


def scraped_job(folder: Path, model: Path) -> Scraper:
    """Run a job until every metric has been found, and stop it then."""
    prompts = [f"{'the fox jumps over a dog '[: 4 + row % 20]}{row}" for row in range(NUM_ROWS)]
    prompts[1] = ""  # an error row
    table = pa.table({"id": range(NUM_ROWS), "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    fields = {
        "name": "scraped",
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {"layers": [2, 4], "threshold": 0.3, "vocab": {"top_k": 32}},
        "sampling": {"max_new_tokens": 24},
        "engine": {"max_resident": 16},
        "cluster": {"replicas": 1},
        "run": {"chunk_rows": 8},
    }
    job = prepare(str(write_job(folder, fields)), [])
    plan = open_plan(job.store, job.plan, dump_spec(job.spec))
    scraper = Scraper()

    def look(progress: Progress) -> None:
        scraper.scrape()
        if not scraper.missing:
            os.kill(os.getpid(), signal.SIGINT)

    with contextlib.suppress(JobInterruptedError):
        run_job(
            job.spec,
            job.model,
            plan,
            job.store,
            on_progress=look,
            on_message=lambda text: None,
            dashboard=False,
        )
    assert not scraper.missing, f"never exported: {sorted(scraper.missing)}"
    return scraper


@pytest.mark.ray
@pytest.mark.timeout(900)  # much of it is waiting for processes to start
def test_every_metric_of_a_running_job_is_scraped(
    quick_ray: None, tiny_llama: Path, tmp_path: Path
) -> None:
    seen = scraped_job(tmp_path, tiny_llama)
    assert set(seen.values("tokens_total", "job_name")) == {"scraped"}
    assert set(seen.values("tokens_total", "replica")) == {"replica-0"}

    tokens = seen.values("tokens_total", "exit_layer")
    assert {"2", "6"} <= set(tokens) <= {"2", "4", "6"}, "some tokens leave early, some do not"
    layers = seen.values("layers_total", "state")
    run = sum(int(layer) * count for layer, count in tokens.items())
    assert layers["run"] == run
    assert layers["run"] + layers["skipped"] == NUM_LAYERS * sum(tokens.values())

    batches, rows = (seen.values(name, "depth") for name in ("batches_total", "batch_rows_total"))
    assert set(batches) == set(rows) == {"0", "1", "2"}
    assert all(1 <= rows[depth] / batches[depth] <= 16 for depth in rows), "16 are resident"
    queues = seen.values("queue_length", "queue")
    assert set(queues) == {"depth 0", "depth 1", "depth 2", "memory", "line"}
    assert set(seen.found["ray_eevp_kept_ids"].values()) == {32.0}
    deep = seen.values("deep_tokens_total", "kept")
    assert deep["yes"] > 0 and sum(deep.values()) == tokens["6"]
    pages = seen.values("kv_pages", "state")
    assert pages["used"] >= 0 and pages["free"] >= 0 and sum(pages.values()) > 0
    assert seen.values("device_idle_seconds_total")[""] > 0
    chunks, buckets = (
        seen.values("chunk_seconds_count")[""],
        seen.values("chunk_seconds_bucket", "le"),
    )
    assert 0 < chunks == buckets["+Inf"]

    status = seen.values("rows", "status")
    assert sum(status.values()) == NUM_ROWS and status["ok"] > 0
    assert status["error"] == 1 and status["skipped"] == 0
    assert seen.values("error_rows", "error_class") == {"EmptyPromptError": 1}
    assert sum(seen.values("chunks", "status").values()) == NUM_ROWS / 8
    assert seen.values("replicas", "status") == {"ready": 1, "starting": 0}
    assert seen.values("eta_seconds")[""] > 0
    assert 0 <= time.time() - seen.values("last_progress_timestamp_seconds")[""] < 300
    assert set(seen.values("retries", "reason").values()) == {0.0}
    assert seen.values("replica_deaths") == {"": 0.0}
    assert {"work", "storage"} == set(seen.values("coordinator_seconds_total", "activity"))


def test_definitions_are_whole_and_tell_no_rows() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.owner in (JOB_TAGS, REPLICA_TAGS)
        assert metric.text.endswith(".") and metric.unit, f"{metric.name} does not explain itself"
        assert not {"row_id", "chunk_id"} & set(metric.tags), f"{metric.name} grows with the rows"


def test_an_engine_goes_on_counting_where_another_has_stopped() -> None:
    before = EngineVitals(
        steps=Counter({0: 2}), rows=Counter({0: 9}), kept=KeptTokens(5, 4), waiting=[3], pages=8
    )
    now = EngineVitals(
        steps=Counter({0: 1, 1: 1}), rows=Counter({0: 4, 1: 2}), kept=KeptTokens(1, 1), pages=16
    ).after(before)
    assert now.steps == Counter({0: 3, 1: 1}) and now.rows == Counter({0: 13, 1: 2})
    assert now.kept == KeptTokens(6, 5) and now.kept.recall == 5 / 6
    assert (list(now.waiting), now.pages) == ([], 16), "what it holds is its own"


def test_what_runs_is_not_idle() -> None:
    clock = IdleClock()
    with clock:
        before = clock.idle_s
        time.sleep(0.02)
        assert clock.idle_s == before, "time within the block counts"
    time.sleep(0.02)
    assert clock.idle_s > before, "time after the block does not count"
