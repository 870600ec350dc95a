"""Plans: every row in exactly one chunk, every bad input named, every resume compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eevp_batch.errors import InputError, JobFailedError, ResumeRefusedError, UsageError
from eevp_batch.spec import ExitSpec, JobSpec, PromptSpec, RunSpec, SamplingSpec
from eevp_batch.storage import scan
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.ids import RepeatedKeys, id_keys, ids_digest
from eevp_batch.storage.plan import Plan, make_plan, open_plan, read_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, make_spec, run_job, stores, write_input

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


# --- rows and chunks ---------------------------------------------------------------------


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    group_rows=st.integers(1, 17),
    chunk_rows=st.integers(1, 20),
    limit=st.none() | st.integers(1, 120),
    batch_rows=st.integers(1, 13),
    as_int=st.booleans(),
)
def test_chunks_hold_every_row_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    group_rows: int,
    chunk_rows: int,
    limit: int | None,
    batch_rows: int,
    as_int: bool,
) -> None:
    folder = tmp_path_factory.mktemp("in")
    ids: list[Any] = []
    for index, count in enumerate(rows):
        fresh = range(len(ids), len(ids) + count)
        own = [number if as_int else f"r{number}" for number in fresh]
        write_input(folder / f"{index}.parquet", own or [0 if as_int else "x"], group_rows)
        if not own:
            path = folder / f"{index}.parquet"
            pq.write_table(pq.read_table(path).slice(0, 0), path)
        ids += own
    spec = make_spec(folder, chunk_rows=chunk_rows, input={"limit": limit})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BATCH_ROWS", batch_rows)
        plan = make_plan(spec, MODEL)
    expected = ids[:limit]
    read = [table_ids(read_chunk(plan, chunk, []), plan, "") for chunk in plan.chunks]
    assert [row_id for part in read for row_id in part] == expected, "chunks partition the rows"
    assert plan.num_rows == len(expected) == sum(chunk.num_rows for chunk in plan.chunks)
    assert [chunk.chunk_id for chunk in plan.chunks] == list(range(len(plan.chunks)))
    assert all(1 <= chunk.num_rows <= chunk_rows for chunk in plan.chunks)
    assert [chunk.id_digest for chunk in plan.chunks] == [ids_digest(part) for part in read]
    per_file = Counter(chunk.file_index for chunk in plan.chunks)
    for index, file in enumerate(plan.files):
        used = sum(chunk.num_rows for chunk in plan.chunks if chunk.file_index == index)
        assert 0 < used <= file.num_rows
        assert per_file[index] == -(-used // chunk_rows), "only a file's last chunk is short"
    assert Plan.from_json(plan.to_json()) == plan


def test_files_past_the_limit_are_not_opened(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", ["a", "b"])
    (tmp_path / "in/b.parquet").write_bytes(b"not Parquet")
    plan = make_plan(make_spec(tmp_path / "in", input={"limit": 2}), MODEL)
    assert plan.num_rows == 2 and len(plan.files) == 1


def test_the_digest_is_of_a_set_whatever_its_order() -> None:
    assert ids_digest(["a", "bc", "d"]) == ids_digest(["d", "a", "bc"])
    different = [["a", "bc"], ["ab", "c"], ["a", "b", "c"], ["abc"], ["a", "bc", "bc"], []]
    assert len({ids_digest(ids) for ids in different}) == len(different)


@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=200),
    more=st.lists(st.integers(0, 30), max_size=60),
    max_in_memory=st.integers(0, 100),
    step=st.integers(1, 40),
)
@settings(deadline=None)
def test_repeated_keys_are_found_in_memory_and_on_disk(
    keys: list[int], more: list[int], max_in_memory: int, step: int
) -> None:
    ids: list[Any] = keys + more
    counts = Counter(ids)
    expected = {key for key in id_keys(ids).tolist()} if ids else set()
    assert len(expected) == len(counts), "different integers have different keys"
    with RepeatedKeys(max_in_memory) as repeated:
        for start in range(0, len(ids), step):
            repeated.add(id_keys(ids[start : start + step]))
        found = set().union(*repeated.repeated())
    twice = [row_id for row_id, count in counts.items() if count > 1]
    assert found == set(id_keys(twice).tolist() if twice else [])


def test_equal_keys_of_different_ids_are_not_a_duplicate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "id_keys", lambda ids: id_keys([0] * len(ids)))
    spec = make_spec(write_input(tmp_path / "in.parquet", ["a", "b", "c"]))
    assert make_plan(spec, MODEL).num_rows == 3
    write_input(tmp_path / "in.parquet", ["a", "b", "a"])
    with pytest.raises(InputError, match="id 'a' in row 2 and in row 0"):
        make_plan(spec, MODEL)


# --- what is refused ---------------------------------------------------------------------


def table(**columns: Any) -> Any:
    return pa.table({"id": ["a", "b"], "prompt": ["p", "q"], "task": [1, 2]} | columns)


BAD = {
    "no id": (table().drop_columns("id"), {}, "input.id_column: found no column 'id'"),
    "no prompt": (table().drop_columns("prompt"), {}, "input.prompt_column: found no column"),
    "no task": (table().drop_columns("task"), {}, "input.keep_columns: found no column 'task'"),
    "null id": (table(id=["a", None]), {}, "a null id in row 1"),
    "null ids": (table(id=pa.nulls(2)), {}, "of type null; allowed: a string or integer column"),
    "twice": (table(id=["a", "a"]), {}, "id 'a' in row 1 and in row 0 of "),
    "twice int": (table(id=[7, 7]), {}, "id 7 in row 1 and in row 0 of "),
    "float id": (table(id=[1.0, 2.0]), {}, "of type double; allowed: a string or integer column"),
    "nested id": (table(id=[{"a": 1}, {"a": 2}]), {}, "of type struct<a: int64>"),
    "list id": (table(id=[[1], [2]]), {}, "allowed: a string or integer column"),
    "bool id": (table(id=[True, False]), {}, "of type bool"),
    "huge id": (table(id=pa.array([1, 2**63], pa.uint64())), {}, "64 signed bits"),
    "null prompts": (table(prompt=pa.nulls(2)), {}, "of type null; allowed: a string column"),
    "int prompts": (table(prompt=[1, 2]), {}, "of type int64; allowed: a string column"),
    "list prompts": (table(prompt=[["p"], ["q"]]), {}, "allowed: a string column"),
    "bytes": (table(prompt=[b"p", b"q"]), {}, "of type binary; allowed: a string column"),
    "ours": (table(text=["x", "y"]), {"keep_columns": ["text"]}, "column 'text'"),
    "ours, all": (table(seed=[1, 2]), {"keep_columns": "all"}, "column 'seed'"),
    "messages": (
        table(),
        {"messages_column": "prompt", "prompt_column": None},
        "input.messages_column: found column 'prompt' of type string; allowed: a list of structs",
    ),
    "two tasks": (
        pa.Table.from_arrays([*table().columns, table()["task"]], ["id", "prompt", "task", "task"]),
        {},
        "2 columns named 'task'",
    ),
    "no rows": (table().slice(0, 0), {}, "no rows in any file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_name_file_field_found_and_allowed(tmp_path: Path, case: str) -> None:
    content, settings, message = BAD[case]
    path = tmp_path / "bad #1.parquet"
    pq.write_table(content, path)
    with pytest.raises(InputError) as caught:
        make_plan(make_spec(path, input=settings), MODEL)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) and "allowed: " in str(caught.value)


def test_a_duplicate_in_another_file_names_both(tmp_path: Path) -> None:
    first = write_input(tmp_path / "a.parquet", [f"r{n}" for n in range(30)])
    second = write_input(tmp_path / "b.parquet", ["x", "r17"])
    with pytest.raises(InputError) as caught:
        make_plan(make_spec(tmp_path), MODEL)
    assert f"id 'r17' in row 1 and in row 17 of {first}" in str(caught.value)
    assert caught.value.file == str(second)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (table(id=[8, 9]), "string ids, as in "),
        (table(id=["c", "d"], task=["x", "y"]), "column 'task' of type string; allowed: int64"),
        (table(id=["c", "d"]).drop_columns("prompt"), "no column 'prompt'"),
    ],
)
def test_files_must_agree(tmp_path: Path, second: Any, message: str) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    with pytest.raises(InputError) as caught:
        make_plan(make_spec(tmp_path), MODEL)
    assert message in str(caught.value) and caught.value.file == str(tmp_path / "b.parquet")


def test_all_keeps_the_same_columns_of_every_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(table(id=["c", "d"], more=[1, 2]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"\['more'\] in only one of"):
        make_plan(make_spec(tmp_path, input={"keep_columns": "all"}), MODEL)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
)
def test_ids_and_prompts_of_any_string_encoding(tmp_path: Path, kind: Any) -> None:
    content = table(id=pa.array(["a", "b"]).cast(kind), prompt=pa.array(["p", None]).cast(kind))
    pq.write_table(content, tmp_path / "in.parquet")
    plan = make_plan(make_spec(tmp_path / "in.parquet"), MODEL)
    read = read_chunk(plan, plan.chunks[0], ["prompt"])
    assert plan.id_type == "string"
    assert read.to_pydict() == {"id": ["a", "b"], "task": [1, 2], "prompt": ["p", None]}
    assert read.schema.field("prompt").type == pa.string()


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64(), pa.int64()])
def test_ids_of_any_integer_type(tmp_path: Path, kind: Any) -> None:
    pq.write_table(table(id=pa.array([3, 100], kind)), tmp_path / "in.parquet")
    plan = make_plan(make_spec(tmp_path / "in.parquet"), MODEL)
    assert plan.id_type == "int64" and plan.chunks[0].id_digest == ids_digest([3, 100])


def test_messages_and_templates_need_no_prompt_column(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "hi"}], None]
    content = table(turns=pa.array(turns, MESSAGES)).drop_columns("prompt")
    pq.write_table(content, tmp_path / "in.parquet")
    path = tmp_path / "in.parquet"
    settings = {"messages_column": "turns", "prompt_column": None}
    assert make_plan(make_spec(path, input=settings), MODEL).num_rows == 2
    template = make_spec(
        path, input={"prompt_column": None}, prompt=PromptSpec(template="{{ task }}")
    )
    assert make_plan(template, MODEL).num_rows == 2


# --- fingerprint and resume --------------------------------------------------------------


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(write_input(tmp_path / "in.parquet", [f"r{n}" for n in range(9)]))


def with_section(spec: JobSpec, **sections: Any) -> JobSpec:
    return spec.model_copy(update=sections)


CHANGES: dict[str, Callable[[JobSpec], JobSpec]] = {
    "exit.threshold": lambda spec: with_section(spec, exit=ExitSpec(threshold=0.5)),
    "exit.layers": lambda spec: with_section(spec, exit=ExitSpec(layers=[3])),
    "sampling.seed": lambda spec: with_section(spec, sampling=SamplingSpec(seed=1)),
    "prompt.system": lambda spec: with_section(spec, prompt=PromptSpec(system="be brief")),
    "input.limit": lambda spec: with_section(
        spec, input=spec.input.model_copy(update={"limit": 9})
    ),
    "run.chunk_rows": lambda spec: with_section(
        spec, run=spec.run.model_copy(update={"chunk_rows": 5})
    ),
    "output.token_stats": lambda spec: with_section(
        spec, output=spec.output.model_copy(update={"token_stats": False})
    ),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_setting_refuses_the_resume_and_is_named(
    tmp_path: Path, spec: JobSpec, field: str
) -> None:
    store = Store.open(tmp_path / "out")
    stored = open_plan(store, make_plan(spec, MODEL))
    with pytest.raises(ResumeRefusedError, match=rf"\n  {field}: planned") as caught:
        open_plan(store, make_plan(CHANGES[field](spec), MODEL))
    assert field in [name for name, _, _ in caught.value.changes]
    assert read_plan(store) == stored, "a refused resume changes nothing"


def test_a_changed_model_or_input_refuses_the_resume(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    open_plan(store, make_plan(spec, MODEL))
    with pytest.raises(ResumeRefusedError, match=r"model\.content_hash: planned 'c0ffee'"):
        open_plan(store, make_plan(spec, replace(MODEL, content_hash="decaf")))
    write_input(tmp_path / "in.parquet", [f"s{n}" for n in range(9)])
    with pytest.raises(ResumeRefusedError, match=r"input\.path\[.*in\.parquet\]"):
        open_plan(store, make_plan(spec, MODEL))


def test_what_changes_no_output_may_change(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    stored = open_plan(store, make_plan(spec, MODEL))
    other = with_section(
        spec,
        cluster=spec.cluster.model_copy(update={"replicas": 7}),
        engine=spec.engine.model_copy(update={"max_batch": 3}),
        output=spec.output.model_copy(update={"compression": "gzip"}),
    )
    moved = replace(MODEL, path="/elsewhere", id="elsewhere")
    assert open_plan(store, make_plan(other, moved)) == stored, "the stored plan is taken up"


@pytest.mark.parametrize("kind", ["local", "file URI", "subtree", "mock"])
def test_a_plan_is_written_once_after_the_resolved_spec(
    tmp_path: Path, spec: JobSpec, kind: str
) -> None:
    store = dict(stores(tmp_path))[kind]
    plan = open_plan(store, make_plan(spec, MODEL), "name: test\n")
    assert store.read("_eevp/job.resolved.yaml") == b"name: test\n"
    assert json.loads(store.read("_eevp/plan.json"))["fingerprint"] == plan.fingerprint
    run = RunSpec(chunk_rows=spec.run.chunk_rows, max_error_rate=0.5)
    later = spec.model_copy(update={"run": run})
    assert open_plan(store, make_plan(later, MODEL), "name: later\n").run_id == plan.run_id
    assert store.read("_eevp/job.resolved.yaml") == b"name: later\n", "what retry-errors goes by"
    with pytest.raises(ResumeRefusedError):
        open_plan(store, make_plan(spec, replace(MODEL, content_hash="decaf")), "name: refused\n")
    assert store.read("_eevp/job.resolved.yaml") == b"name: later\n"


def test_results_without_a_plan_are_never_written_over(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    run_job(store, spec)
    store.delete("_eevp/plan.json")
    with pytest.raises(UsageError, match=r"found files in data/ but no _eevp/plan\.json"):
        open_plan(store, make_plan(spec, MODEL))


def test_a_damaged_or_foreign_plan_is_refused(tmp_path: Path, spec: JobSpec) -> None:
    store = Store.open(tmp_path / "out")
    with pytest.raises(UsageError, match="holds no job"):
        read_plan(store)
    text = open_plan(store, make_plan(spec, MODEL)).to_json()
    for damaged in (text[:-5], "[]", "{}", text.replace('"run_id"', '"walk_id"')):
        store.write("_eevp/plan.json", damaged.encode())
        with pytest.raises(JobFailedError, match=r"plan\.json is damaged"):
            read_plan(store)
    store.write(
        "_eevp/plan.json", text.replace('"format_version": 1', '"format_version": 9').encode()
    )
    with pytest.raises(JobFailedError, match="found format version 9; allowed: 1"):
        read_plan(store)
