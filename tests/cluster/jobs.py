"""Small whole jobs for the tests: their input, their plan, and what they left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.cluster.jobs import JobResult, run_job
from eevp_batch.cluster.progress import Progress
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import JobSpec
from eevp_batch.storage.plan import Plan, make_plan, open_plan
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.cluster.scripted import NUM_LAYERS, Script

MODEL = ModelConfig(
    path="scripted",
    model_type="llama",
    num_layers=NUM_LAYERS,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_size=8,
    intermediate_size=8,
    vocab_size=256,
    context_length=64,
    id="scripted",
    revision=None,
    content_hash="0" * 64,
)


@dataclass
class Job:
    """A job in a folder of its own."""

    spec: JobSpec
    plan: Plan
    store: Store
    on_progress: Callable[[Progress], None] | None = None
    progress: list[Progress] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return Path(self.store.text)

    def run(self, script: Script, retry: Sequence[str] | None = None, **run: Any) -> JobResult:
        """Run it, or retry its error rows; `run` replaces settings of the job's `run` section."""
        spec = self.spec.model_copy(update={"run": self.spec.run.model_copy(update=run)})
        return run_job(
            spec,
            MODEL,
            self.plan,
            self.store,
            build=script.build,
            on_progress=self.on_progress or self.progress.append,
            on_message=self.messages.append,
            dashboard=False,
            retry=retry,
        )

    def rows(self) -> list[dict[str, Any]]:
        """The output in row and sample order, without what may differ from run to run."""
        return sorted(
            _read(self.out / "data", "attempt"),
            key=lambda row: (row["row_id"], row["sample_index"]),
        )

    def errors(self) -> list[dict[str, Any]]:
        return sorted(_read(self.out / "errors"), key=lambda row: row["row_id"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.out / "_eevp" / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def parts(self) -> dict[str, int]:
        """Modification times, in nanoseconds, of the parts that a commit record vouches for."""
        names = [path.stem for path in (self.out / "_eevp" / "commits").glob("*.json")]
        return {
            f"{folder}/{name}": path.stat().st_mtime_ns
            for folder in ("data", "errors")
            for name in names
            if (path := self.out / folder / f"part-{name}.parquet").exists()
        }

    def problems(self) -> list[str]:
        return verify(self.store).problems


def make_job(
    folder: Path,
    prompts: Sequence[str | None] | int = 60,
    chunk_rows: int = 5,
    replicas: int = 2,
    out: str = "out",
    run: Mapping[str, Any] | None = None,
    n: int = 1,
    keep: Sequence[str] = (),
    address: str | None = None,
) -> Job:
    """A job over rows 0, 1, 2, ... with these prompts, planned and ready to run."""
    if isinstance(prompts, int):
        prompts = [f"prompt {row}" for row in range(prompts)]
    source = folder / "prompts.parquet"
    if not source.exists():
        table = pa.table({"id": range(len(prompts)), "prompt": pa.array(prompts, pa.string())})
        pq.write_table(table, source)
    spec = JobSpec.model_validate(
        {
            "name": "scripted",
            "input": {"path": str(source), "keep_columns": list(keep)},
            "model": {"path": "scripted"},
            "sampling": {"n": n},
            "cluster": {"replicas": replicas, "cpus_per_replica": 1.0, "address": address},
            "run": {"chunk_rows": chunk_rows, **(run or {})},
            "output": {"path": str(folder / out)},
        }
    )
    store = Store.open(spec.output.path)
    return Job(spec, open_plan(store, make_plan(spec, MODEL)), store)


def _read(folder: Path, *dropped: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [{k: v for k, v in row.items() if k not in dropped} for row in rows]
