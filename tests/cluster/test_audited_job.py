"""Whole audited jobs: what is written, when it warns, and what stopping exits does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.cluster.audit import AuditedEngine, is_audited
from eevp_batch.cluster.engine_loop import RowEncoder, RowEngine
from eevp_batch.cluster.jobs import run_job
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.report.summary import summarise
from eevp_batch.report.text import render_status, render_summary
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from eevp_batch.tune.text_distance import edit_loss, first_divergence
from tests.cluster.jobs import MODEL, make_job
from tests.cluster.scripted import Script, ScriptedEncoder, ScriptedEngine
from tests.cluster.test_audit import WholeEngine
from tests.plain_output import columns, events, parts, read_rows
from tests.real_jobs import run_in_process, write_job

pytestmark = pytest.mark.ray

NUM_ROWS = 60
AUDIT = {"full_depth_fraction": 0.5, "delta": 0.02}


def audited_job(folder: Path, model: Path, threshold: float, **audit: Any) -> Path:
    prompts = [f"{'the fox jumps over a dog '[: 4 + row % 20]}{row}" for row in range(NUM_ROWS)]
    table = pa.table({"id": [f"q{row:02}" for row in range(NUM_ROWS)], "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    fields = {
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {"layers": [2, 4], "threshold": threshold},
        "sampling": {"max_new_tokens": 16},
        "run": {"chunk_rows": 6},
        "audit": {**AUDIT, **audit},
    }
    return write_job(folder, fields)


def test_an_audit_of_bold_exits_warns_and_keeps_what_full_depth_gives(
    shared_ray: LocalRay, tiny_llama: Path, tmp_path: Path
) -> None:
    run_in_process(audited_job(tmp_path, tiny_llama, threshold=0.0))
    (drift,) = events(tmp_path / "out", "audit_drift")
    assert drift["interval"][0] > drift["bound"] == 0.02 and not drift["stops_exits"]
    rows = read_rows(tmp_path / "out")
    for row in rows:
        whole = row["audit_token_ids"]
        assert (whole is not None) == is_audited(0, row["row_id"], 0.5), "the chosen rows, no other"
        if whole is not None:
            assert row["audit_first_divergence"] == first_divergence(row["token_ids"], whole)
            assert row["audit_distance"] == pytest.approx(edit_loss(row["token_ids"], whole))
    audited = {row["row_id"]: row["audit_token_ids"] for row in rows if row["audit_token_ids"]}
    run_in_process(
        audited_job(tmp_path, tiny_llama, 0.0),
        ["exit.mode=off", "audit.full_depth_fraction=0.0", "output.path=off"],
    )
    full = {row["row_id"]: row["token_ids"] for row in read_rows(tmp_path / "off")}
    assert all(full[row_id] == ids for row_id, ids in audited.items()), (
        "an audit's tokens are those of the job with exits off"
    )
    store = Store.open(tmp_path / "out")
    summary = summarise(store)
    assert summary.audit is not None and summary.audit.rows == len(audited)
    assert "more tokens differ than the 2.0 % allowed" in render_summary(summary, 100)
    assert "rows at full depth too" in render_status(read_status(store), 100, 0.0)


def test_an_audit_of_exits_that_nobody_takes_finds_nothing(
    shared_ray: LocalRay, tiny_llama: Path, tmp_path: Path
) -> None:
    run_in_process(audited_job(tmp_path, tiny_llama, threshold=1.5))
    assert not events(tmp_path / "out", "audit_drift")
    found = summarise(Store.open(tmp_path / "out")).audit
    assert found is not None and found.diverged == 0 and found.rows > 10
    assert "audit_distance" in columns(parts(tmp_path / "out")[0])


def test_a_warning_stops_exits_and_every_row_tells_its_phase(
    shared_ray: LocalRay, tiny_llama: Path, tmp_path: Path
) -> None:
    job = audited_job(tmp_path, tiny_llama, threshold=0.0, stop_exits=True)
    run_in_process(job, ["engine.max_resident=4"])
    rows = read_rows(tmp_path / "out")
    phases = {row["phase"] for row in rows}
    assert phases == {"exits", "full"}, "the job began with exits and ended without"
    for row in rows:
        if row["phase"] == "full":
            assert set(row["exit_layers"]) == {6} and row["audit_token_ids"] is None
    leased = {e["chunk_id"]: e["phase"] for e in events(tmp_path / "out", "chunk_leased")}
    assert all(leased[row["chunk_id"]] == row["phase"] for row in rows)
    assert (tmp_path / "out" / "_eevp" / "exits_stopped.json").exists()


def build_drifting(different: frozenset[int]) -> tuple[RowEngine, RowEncoder]:
    whole = WholeEngine(Script(), different)  # type: ignore[arg-type]
    return AuditedEngine(ScriptedEngine(Script()), whole, 0, 0.5), ScriptedEncoder()


def test_prompts_that_change_in_the_middle_of_a_job_are_noticed(
    shared_ray: LocalRay, tmp_path: Path
) -> None:
    """Nothing differs in the first half, every row in the second."""
    job = make_job(tmp_path, prompts=120, replicas=1)
    audit = job.spec.audit.model_copy(update={"full_depth_fraction": 0.5, "delta": 0.05})
    spec = job.spec.model_copy(
        update={
            "audit": audit,
            "output": job.spec.output.model_copy(update={"path": str(tmp_path / "watched")}),
        }
    )
    store = Store.open(spec.output.path)
    plan = open_plan(store, make_plan(spec, MODEL))
    messages: list[str] = []
    run_job(
        spec,
        MODEL,
        plan,
        store,
        build=partial(build_drifting, frozenset(range(60, 120))),
        on_message=messages.append,
        dashboard=False,
    )
    log = events(tmp_path / "watched")
    warned = next(place for place, event in enumerate(log) if event["event"] == "audit_drift")
    before = [e["chunk_id"] for e in log[:warned] if e["event"] == "chunk_committed"]
    assert max(before) >= 12, "the first half gives no reason to warn"
    assert len(before) < 24, "the warning comes before the end"
    assert any("allowed: 5.00%" in message for message in messages)
