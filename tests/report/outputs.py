"""Finished outputs with hostile texts, deaths, errors, an audit, made without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from eevp_batch.cluster.events import EventLog
from eevp_batch.model_config import ModelConfig, read_model_config
from eevp_batch.records import Audit, Generation, RowFailure, TokenExit
from eevp_batch.row_counts import KeptTokens
from eevp_batch.spec import JobSpec, ModelSpec
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Committer, write_attempt
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import make_spec

EVIL = "</script><img src=x onerror=\"document.title='hacked'\"><b>bold</b> & 'quoted' \u2028"
TEXT = f"The fox jumps over 12 dogs, quickly.\n{EVIL} ü 日本"
NUM_ROWS = 24
ROWS_PER_CHUNK = 4
START = 1_795_500_000.0


def evil_id(row: int) -> str:
    return f"row-{row}{EVIL if row % 3 == 0 else ''}"


def write_prompts(path: Path) -> Path:
    rows = range(NUM_ROWS)
    columns = {
        "id": [evil_id(row) for row in rows],
        "prompt": [f"{EVIL} prompt {row}" for row in rows],
        "task": [EVIL if row % 2 else "plain" for row in rows],
        "topic": [f"topic {row}" for row in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


def generation(
    row_id: str, row: int, model: ModelConfig, layers: list[int], is_audited: bool
) -> Generation:
    """The hostile text, after every exit layer in turn; every second audit finds one wrong."""
    tokenizer = Tokenizer.from_file(f"{model.path}/tokenizer.json")
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False).ids, 1]
    exits = [
        TokenExit(token, layers[k % len(layers)], 1 - 0.4 / (k + 1)) for k, token in enumerate(ids)
    ]
    audit = None
    if is_audited:
        audit = Audit(ids, None if row % 4 else 5, 0.0 if row % 4 else 0.5)
    deep = sum(exit.exit_layer == model.num_layers for exit in exits)
    return Generation(
        row_id,
        0,
        3,
        exits,
        TEXT,
        "eos",
        7,
        model.num_layers,
        audit=audit,
        kept=KeptTokens(deep, deep - 1),
        seconds=1.0 + row / 10,
    )


def audited_spec(source: Path, **sections: Any) -> JobSpec:
    return make_spec(
        source,
        chunk_rows=ROWS_PER_CHUNK,
        input={"keep_columns": ["task", "topic"]},
        audit={"full_depth_fraction": 0.5},
        **sections,
    )


def make_output(folder: Path, model_path: Path, spec: JobSpec | None = None) -> Store:
    """Every fifth row fails; two replicas work, one of which dies with a hostile reason."""
    model = read_model_config(ModelSpec(path=str(model_path)))
    spec = spec or audited_spec(write_prompts(folder / "in.parquet"))
    store = Store.open(folder / "out")
    plan = open_plan(store, make_plan(spec, model), f"version: 1\nname: test  # {EVIL}\n")
    committer, has_audit = Committer(store, plan), plan.extras.audit
    layers = plan.fields["exit.layers"]
    for chunk in plan.chunks:
        source = read_chunk(plan, chunk, ["prompt"])
        generations, failures = [], []
        for place, row_id in enumerate(table_ids(source, plan, "input")):
            row = chunk.chunk_id * ROWS_PER_CHUNK + place
            if row % 5 == 4:
                failures.append(RowFailure(row_id, "EmptyPromptError", f"{EVIL} row {row}"))
            else:
                is_audited = has_audit and row % 2 == 0
                generations.append(generation(str(row_id), row, model, layers, is_audited))
        attempt = write_attempt(
            store, plan, spec, chunk, 1, 1, source, generations, failures, "replica-0", START
        )
        committer.commit(attempt, 1)
    committer.finish({"replicas": 2, "eevp_batch": "0.0"})
    return store


def write_events(store: Store) -> None:
    """A first run in which a replica dies and that is killed, and a second that finishes."""
    log = EventLog(store)

    def write(at_s: float, event: str, **fields: Any) -> None:
        log.write(event, **{**fields, "unix_s": START + at_s})

    machine = {"cpu": EVIL, "cores": 2, "memory_bytes": 1 << 34, "gpus": [], "python": "3.11"}
    write(0, "job_started", chunks=6, chunks_committed=0, replicas=2, pid=1)
    for replica in ("replica-0", "replica-1"):
        write(10, "replica_ready", replica=replica, pid=2, machine=machine)
    write(10, "chunk_leased", chunk_id=0, epoch=1, replica="replica-0")
    write(10, "chunk_leased", chunk_id=1, epoch=2, replica="replica-1")
    done = {"rows_ok": 3, "rows_error": 1, "generated_tokens": 100}
    write(20, "chunk_committed", chunk_id=0, epoch=1, replica="replica-0", **done)
    write(25, "replica_dead", replica="replica-1", reason=EVIL, chunks=[1])
    write(1000, "job_resumed", chunks=6, chunks_committed=1, replicas=1, pid=3)
    write(1005, "replica_ready", replica="replica-0", pid=4)
    for chunk_id in range(1, 6):
        name = {"chunk_id": chunk_id, "epoch": chunk_id + 9, "replica": "replica-0"}
        write(1000 + 10 * chunk_id, "chunk_leased", **name)
        write(1005 + 10 * chunk_id, "chunk_committed", **name, **done)
    write(1060, "job_finished", wall_s=60.0)
