"""Whatever is done to a finished output, `verify` finds it and names the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import UsageError
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import make_plan, open_plan, read_plan
from eevp_batch.storage.status import read_status
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.storage.jobs import MODEL, attempt_chunk, is_failing, make_spec, run_job, write_input

NUM_ROWS = 18


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    path = write_input(tmp_path / "in.parquet", [f"row {n}" for n in range(NUM_ROWS)])
    return make_spec(path, num_samples=2)


@pytest.fixture
def out(tmp_path: Path, spec: JobSpec) -> Path:
    folder = tmp_path / "out put #1"
    run_job(Store.open(folder), spec)
    return folder


def problems(out: Path) -> list[str]:
    return verify(Store.open(out)).problems


def rewrite(out: Path, rel: str, change: Callable[[Any], Any]) -> None:
    """Change a part's table, and its record so that the checksum is right again."""
    table = change(pq.read_table(out / rel))
    pq.write_table(table, out / rel)
    path = out / f"_eevp/commits/{rel[-13:-8]}.json"
    record = json.loads(path.read_text())
    kind = rel.partition("/")[0]
    record["attempt"][f"{kind}_sha256"] = hashlib.sha256((out / rel).read_bytes()).hexdigest()
    path.write_text(json.dumps(record))


def test_a_finished_output_has_no_problems(out: Path) -> None:
    report = verify(Store.open(out))
    failing = sum(is_failing(f"row {n}") for n in range(NUM_ROWS))
    assert report.problems == []
    assert (report.rows_in, report.rows_ok, report.rows_error) == (
        NUM_ROWS,
        NUM_ROWS - failing,
        failing,
    )
    assert report.parts == len(list(out.glob("*/part-*")))


def test_success_says_what_sha256sum_says(out: Path) -> None:
    success = json.loads((out / "_SUCCESS").read_text())
    for kind in ("data", "errors"):
        parts = sorted((out / kind).iterdir())
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {kind}/{path.name}\n"
            for path in parts
        ]
        assert success["parts"][kind] == len(parts) > 0
        assert success["checksums"][kind] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert success["rows"]["in"] == success["rows"]["ok"] + success["rows"]["error"] == NUM_ROWS
    assert success["totals"]["generations"] == 2 * success["rows"]["ok"]
    assert success["run"] == {"replicas": 1}


@pytest.mark.parametrize("kind", ["data", "errors"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "altered", "emptied", "swapped"])
def test_a_damaged_part_is_named(out: Path, kind: str, damage: str) -> None:
    path, other = sorted((out / kind).iterdir())[:2]
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "swapped":
        path.write_bytes(other.read_bytes())
    else:
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    words = {"deleted": "the file is missing"}.get(damage, "the checksum is not the recorded one")
    assert any(p.startswith(f"{kind}/{path.name}: {words}") for p in problems(out))


def test_every_byte_of_a_part_is_covered(out: Path) -> None:
    path = next((out / "errors").iterdir())
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        changed = bytearray(content)
        changed[position] ^= 0x10
        path.write_bytes(bytes(changed))
        assert any(path.name in problem for problem in problems(out)), f"byte {position}"


def test_a_deleted_record_is_named(out: Path) -> None:
    (out / "_eevp/commits/00001.json").unlink()
    found = problems(out)
    assert any("1 of 5 chunks have no commit record: _eevp/commits/00001.json" in p for p in found)
    assert any(p.startswith("data/part-00001.parquet: no commit record names") for p in found)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"attempt": 3}'])
def test_a_damaged_record_is_named(out: Path, content: str) -> None:
    (out / "_eevp/commits/00001.json").write_text(content)
    assert any(p.startswith("_eevp/commits/00001.json: damaged") for p in problems(out))


def double_first(table: Any) -> Any:
    return pa.concat_tables([table, table.slice(0, 1)])


def rename_first(table: Any) -> Any:
    ids = ["nobody", *table["row_id"].to_pylist()[1:]]
    return table.set_column(0, table.schema.field(0), pa.array(ids))


CONTENT = {
    "duplicate id": (double_first, "sample 0 stands 2 times"),
    "lost sample": (lambda table: table.slice(1), "not every row has the samples 0 to 1"),
    "lost row": (lambda table: table.slice(2), "the row ids are not those of chunk"),
    "other id": (rename_first, "the row ids are not those of chunk"),
    "lost column": (lambda table: table.drop_columns("seed"), "the columns are not the planned"),
    "lost metadata": (lambda table: table.replace_schema_metadata({}), "the metadata eevp."),
    "other type": (
        lambda table: table.set_column(2, "task", pa.array([1] * table.num_rows)),
        "the columns differ from those of the first part",
    ),
    "lost id column": (lambda table: table.drop_columns("row_id"), "the columns are not"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_content_is_checked_even_where_the_checksum_is_right(out: Path, case: str) -> None:
    change, words = CONTENT[case]
    parts = [path for path in (out / "data").iterdir() if pq.read_metadata(path).num_rows >= 4]
    rel = f"data/{max(parts).name}"
    rewrite(out, rel, change)
    found = problems(out)
    assert any(rel in problem and words in problem for problem in found), found


def test_a_row_that_is_both_done_and_failed_is_named(out: Path) -> None:
    both = sorted({p.name for p in (out / "data").iterdir()} & set(os.listdir(out / "errors")))[0]
    row_id = pq.read_table(out / "data" / both)["row_id"][0].as_py()

    def add(table: Any) -> Any:
        more = table.slice(0, 1).set_column(0, table.schema.field(0), pa.array([row_id]))
        return pa.concat_tables([table, more])

    rewrite(out, f"errors/{both}", add)
    assert any(f"row {row_id!r} stands twice" in problem for problem in problems(out))


@pytest.mark.parametrize("name", ["data/part-00099.parquet", "data/extra.parquet", "errors/x.csv"])
def test_a_stray_file_is_named(out: Path, name: str) -> None:
    (out / name).write_bytes(b"")
    words = "no commit record names this file; it is not the job's, move it elsewhere"
    assert problems(out) == [f"{name}: {words}"]
    assert not verify(Store.open(out)).damaged, "no repair mends it"
    (out / name).rename(out / "data/.hidden")
    assert problems(out) == [], "what Parquet readers skip is nobody's output"


def test_a_record_beyond_the_plan_is_named(out: Path) -> None:
    (out / "_eevp/commits/00099.json").write_text("{}")
    assert problems(out) == ["_eevp/commits/00099.json: the plan has no such chunk"]


def test_an_altered_plan_is_named(out: Path) -> None:
    text = (out / "_eevp/plan.json").read_text()
    (out / "_eevp/plan.json").write_text(text.replace('"sampling.seed": 0', '"sampling.seed": 1'))
    assert any("the fingerprint is not that of the fields" in problem for problem in problems(out))


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_missing_or_wrong_success_is_named(out: Path, content: str | None) -> None:
    if content is None:
        (out / "_SUCCESS").unlink()
    else:
        (out / "_SUCCESS").write_text(content)
    found = problems(out)
    assert found and all(problem.startswith("_SUCCESS: ") for problem in found)


def test_success_of_other_counts_is_named(out: Path) -> None:
    success = json.loads((out / "_SUCCESS").read_text())
    success["rows"]["ok"] -= 1
    success["totals"]["slowest"] = []
    (out / "_SUCCESS").write_text(json.dumps(success))
    rows_ok = success["rows"]["ok"]
    assert problems(out) == [
        f"_SUCCESS: rows.ok is {rows_ok}, but storage holds {rows_ok + 1}",
        "_SUCCESS: totals.slowest is not what storage holds",
    ]


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    for read in (verify, read_status):
        with pytest.raises(UsageError, match="holds no job"):
            read(Store.open(tmp_path))


# --- status ------------------------------------------------------------------------------


def test_status_of_a_finished_job(out: Path) -> None:
    store = Store.open(out)
    status = read_status(store)
    assert (status.state, status.rows_done, status.rows_total) == ("done", NUM_ROWS, NUM_ROWS)
    assert status.chunks_done == status.chunks_total == 5
    success = json.loads((out / "_SUCCESS").read_text())
    assert json.loads(json.dumps(status.to_json()))["totals"] == success["totals"]
    assert status.tokens_per_s is not None and status.tokens_per_s > 0
    failed = {"event": "job_failed", "unix_s": 0.0, "reason": "TooManyErrorsError: of a retry"}
    store.append_line("_eevp/events.jsonl", json.dumps(failed))
    status = read_status(store)
    assert (status.state, status.reason) == ("done", None), "what is done has not failed"
    (out / "_eevp/commits/00001.json").unlink()
    status = read_status(store)
    assert status.chunks_done == 4 and status.state != "done", "a record was lost since"


def test_status_follows_a_job(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    plan = open_plan(store, make_plan(spec, MODEL))
    status = read_status(store)
    assert (status.state, status.rows_done, status.tokens_per_s) == ("planned", 0, None)

    def event(name: str, unix_s: float, **fields: Any) -> None:
        line = json.dumps({"event": name, "unix_s": unix_s, **fields})
        store.append_line("_eevp/events.jsonl", line)

    event("job_started", 1000.0)
    assert read_status(store).state == "interrupted", "nobody holds the lock"
    committer = Committer(store, plan)
    with committer.lock():
        committer.commit(attempt_chunk(store, plan, spec, plan.chunks[0]), 1)
        status = read_status(store)
        assert status.state == "running", "a held lock tells, however long nothing happens"
        assert (status.rows_done, status.chunks_done) == (4, 1)
        assert status.totals == committer.totals()
    with (tmp_path / "out/_eevp/events.jsonl").open("a") as events:
        events.write('{"event": "job_fini')
    assert read_status(store).state == "interrupted", "the lock is free and no end is told"
    event("job_interrupted", 1002.0, reason="SIGINT")
    status = read_status(store)
    assert (status.state, status.reason) == ("interrupted", "SIGINT")
    event("job_resumed", 1004.0)
    event("job_failed", 1005.0, reason="five deaths")
    status = read_status(store)
    assert (status.state, status.reason) == ("failed", "five deaths")


def test_the_speed_is_that_of_the_last_run_that_committed(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    open_plan(store, make_plan(spec, MODEL))

    def rate_after(*events: dict[str, Any]) -> float | None:
        for line in events:
            store.append_line("_eevp/events.jsonl", json.dumps(line))
        return read_status(store).tokens_per_s

    def commit(unix_s: float, tokens: int) -> dict[str, Any]:
        return {"event": "chunk_committed", "unix_s": unix_s, "generated_tokens": tokens}

    started = {"event": "job_started", "unix_s": 0.0}
    ready = [{"event": "replica_ready", "unix_s": unix_s} for unix_s in (10.0, 12.0)]
    assert rate_after(started, *ready) is None
    assert rate_after(commit(20.0, 500), commit(30.0, 500)) == 50.0, "1,000 tokens in 20 s"
    resumed = {"event": "job_resumed", "unix_s": 200.0}
    assert rate_after(resumed) == 50.0, "a run without a commit tells nothing new"
    assert rate_after(ready[0] | {"unix_s": 210.0}, commit(220.0, 100)) == 10.0
    retried = {"event": "retry_started", "unix_s": 300.0}
    again = (retried, ready[0] | {"unix_s": 310.0}, commit(320.0, 0))
    assert rate_after(*again) == 10.0, "a run that made no token is no measure"


def test_status_reads_a_store_without_locks() -> None:
    store = Store(pa.fs._MockFileSystem(), "bucket/out")
    assert store.is_locked("_eevp/lock") is None
    with pytest.raises(UsageError, match="holds no job"):
        read_plan(store)
