"""A whole job without a model: inputs, spec, scripted results, and the coordinator's loop."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from eevp_batch.model_config import ModelConfig
from eevp_batch.records import Generation, RowFailure, RowId, TokenExit
from eevp_batch.spec import InputSpec, JobSpec, ModelSpec, OutputSpec, RunSpec, SamplingSpec
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Attempt, Committer, write_attempt
from eevp_batch.storage.plan import Chunk, Plan, make_plan, open_plan
from eevp_batch.storage.store import Store

MODEL = ModelConfig(
    path="/models/tiny",
    model_type="llama",
    num_layers=6,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    intermediate_size=128,
    vocab_size=320,
    context_length=256,
    id="tiny",
    revision=None,
    content_hash="c0ffee",
)


def write_input(path: Path, ids: Sequence[RowId | None], row_group_rows: int = 7) -> Path:
    """A Parquet file with the columns id, prompt and task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
    table = pa.table(
        {
            "id": pa.array(ids, kind),
            "prompt": [f"prompt of {row_id}" for row_id in ids],
            "task": pa.array([f"task {row % 3}" for row in range(len(ids))], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_rows)
    return path


def make_spec(
    path: str | Path | list[str],
    *,
    chunk_rows: int = 4,
    num_samples: int = 1,
    input: dict[str, Any] | None = None,
    token_stats: bool = True,
    **sections: Any,
) -> JobSpec:
    """A job over `path` that keeps the column `task`."""
    source = {"path": path if isinstance(path, list) else str(path), "keep_columns": ["task"]}
    return JobSpec(
        version=1,
        name="test",
        input=InputSpec(**(source | (input or {}))),
        model=ModelSpec(path="tiny"),
        sampling=SamplingSpec(n=num_samples),
        run=RunSpec(chunk_rows=chunk_rows),
        output=OutputSpec(path="out", token_stats=token_stats),
        **sections,
    )


def is_failing(row_id: RowId) -> bool:
    """About every fourth row fails, by its id alone."""
    return hashlib.sha256(str(row_id).encode()).digest()[0] % 4 == 0


def generation(row_id: RowId, sample_index: int = 0) -> Generation:
    """A generation that depends on the row alone."""
    digest = hashlib.sha256(f"{row_id}/{sample_index}".encode()).digest()
    drawn = digest[: 1 + digest[0] % 7]
    exits = [TokenExit(byte, (2, 4, 6)[byte % 3], byte / 256) for byte in drawn]
    return Generation(
        row_id=row_id,
        sample_index=sample_index,
        prompt_tokens=3,
        exits=exits,
        text=f"text of {row_id} ü",
        finish_reason="eos",
        seed=int.from_bytes(digest[:8], "big"),
        num_layers=6,
    )


def results(plan: Plan, ids: Sequence[RowId]) -> tuple[list[Generation], list[RowFailure]]:
    """Scripted results of some rows, last row first: engines finish rows in any order."""
    generations = [
        generation(row_id, sample)
        for row_id in reversed(ids)
        if not is_failing(row_id)
        for sample in reversed(range(plan.num_samples))
    ]
    failures = [
        RowFailure(row_id, "EmptyPromptError", f"row {row_id} is empty")
        for row_id in reversed(ids)
        if is_failing(row_id)
    ]
    return generations, failures


def attempt_chunk(store: Store, plan: Plan, spec: JobSpec, chunk: Chunk, epoch: int = 1) -> Attempt:
    """What a replica does with one lease."""
    source = read_chunk(plan, chunk, ["prompt"])
    generations, failures = results(plan, table_ids(source, plan, "input"))
    return write_attempt(
        store, plan, spec, chunk, epoch, 1, source, generations, failures, "replica-0", 1.0
    )


def run_job(store: Store, spec: JobSpec) -> dict[str, Any]:
    """What a coordinator does, from plan to `_SUCCESS`."""
    plan = open_plan(store, make_plan(spec, MODEL), "version: 1\n")
    committer = Committer(store, plan)
    committer.clean_attempts()
    done = committer.committed()
    for chunk in plan.chunks:
        if chunk.chunk_id not in done:
            committer.commit(attempt_chunk(store, plan, spec, chunk), 1)
    return committer.finish({"replicas": 1})


def stores(tmp_path: Path) -> Iterator[tuple[str, Store]]:
    """An empty store of every kind."""
    local = tmp_path / "local disk #1 100% ü"
    yield "local", Store.open(local)
    yield "file URI", Store.open((tmp_path / "uri #2 %41 ü").as_uri())
    base = tmp_path / "subtree"
    base.mkdir()
    subtree = pa.fs.SubTreeFileSystem(str(base), pa.fs.LocalFileSystem())
    yield "subtree", Store(subtree, "some/out")
    yield "mock", Store(pa.fs._MockFileSystem(), "bucket/out")


def snapshot(store: Store) -> dict[str, bytes]:
    """The content of every published part, by name."""
    return {
        f"{folder}/{name}": store.read(f"{folder}/{name}")
        for folder in ("data", "errors")
        for name in store.list(folder)
    }


def takers(store: Store, content: Callable[[int], bytes]) -> list[int]:
    """Numbers of those of eight threads at once that created `record`, each with its content."""
    won, start = [], threading.Barrier(8)

    def take(number: int) -> None:
        start.wait()
        try:
            store.create_exclusive("record", content(number))
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won
