"""The columns of the output, literally, as a reader with pyarrow alone sees them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from eevp_batch.spec import ExitSpec, JobSpec
from eevp_batch.storage.chunks import build_tables, read_chunk, table_ids
from eevp_batch.storage.plan import Plan, make_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import (
    MODEL,
    generation,
    is_failing,
    make_spec,
    results,
    run_job,
    write_input,
)

COLUMNS = [
    ("row_id", "string"),
    ("sample_index", "int32"),
    ("task", "string"),
    ("prompt_tokens", "int32"),
    ("generated_tokens", "int32"),
    ("text", "string"),
    ("finish_reason", "string"),
    ("token_ids", "list<element: int32>"),
    ("exit_layers", "list<element: uint16>"),
    ("exit_confidences", "list<element: float>"),
    ("mean_exit_layer", "float"),
    ("layers_skipped_fraction", "float"),
    ("seed", "uint64"),
    ("chunk_id", "int32"),
    ("attempt", "int32"),
]
ERROR_COLUMNS = [
    ("row_id", "string"),
    ("error_class", "string"),
    ("message", "string"),
    ("attempts", "int32"),
    ("chunk_id", "int32"),
]


def columns_of(schema: Any) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in schema]


@pytest.fixture
def ids() -> list[str]:
    return [f"row {number}" for number in range(13)]


def run(tmp_path: Path, spec: JobSpec) -> Path:
    run_job(Store.open(tmp_path / "out"), spec)
    return tmp_path / "out"


def test_every_part_has_the_designed_columns(tmp_path: Path, ids: list[str]) -> None:
    out = run(tmp_path, make_spec(write_input(tmp_path / "in.parquet", ids)))
    for path in out.glob("data/*.parquet"):
        assert columns_of(pq.read_schema(path)) == COLUMNS
    for path in out.glob("errors/*.parquet"):
        assert columns_of(pq.read_schema(path)) == ERROR_COLUMNS
    assert len(list(out.glob("data/*.parquet"))) > 1 and list(out.glob("errors/*.parquet"))


def test_without_token_stats_the_exit_lists_are_left_out(tmp_path: Path, ids: list[str]) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", ids), token_stats=False)
    schema = ds.dataset(run(tmp_path, spec) / "data").schema
    assert columns_of(schema) == [column for column in COLUMNS if column[0][:5] != "exit_"]


def test_the_output_is_one_dataset_with_each_row_and_sample_once(
    tmp_path: Path, ids: list[str]
) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", ids), num_samples=3)
    out = run(tmp_path, spec)
    rows = ds.dataset(out / "data").to_table().to_pylist()
    errors = ds.dataset(out / "errors").to_table().to_pylist()
    fine = [row_id for row_id in ids if not is_failing(row_id)]
    assert [(row["row_id"], row["sample_index"]) for row in rows] == [
        (row_id, sample) for row_id in fine for sample in range(3)
    ], "input order, then samples"
    assert [row["row_id"] for row in errors] == [row_id for row_id in ids if is_failing(row_id)]
    for row in rows:
        expected = generation(row["row_id"], row["sample_index"])
        assert row["task"] == f"task {ids.index(row['row_id']) % 3}", "kept columns go with rows"
        for name in ("text", "seed", "token_ids", "exit_layers", "prompt_tokens", "finish_reason"):
            assert row[name] == getattr(expected, name)
        assert row["exit_confidences"] == expected.exit_confidences, "multiples of 1/256 are exact"
        lengths = {len(row[name]) for name in ("token_ids", "exit_layers", "exit_confidences")}
        assert lengths == {row["generated_tokens"]}
        assert row["mean_exit_layer"] == pytest.approx(expected.mean_exit_layer)
        skipped = 1 - row["mean_exit_layer"] / MODEL.num_layers
        assert row["layers_skipped_fraction"] == pytest.approx(skipped, abs=1e-6)
        assert (row["chunk_id"], row["attempt"]) == (ids.index(row["row_id"]) // 4, 1)


def test_every_part_says_where_it_comes_from(tmp_path: Path, ids: list[str]) -> None:
    exit = ExitSpec(threshold=0.7, layers=[2, 4], confidence="max_prob")
    out = run(tmp_path, make_spec(write_input(tmp_path / "in.parquet", ids), exit=exit))
    plan = Plan.from_json((out / "_eevp/plan.json").read_text())
    for path in [*out.glob("data/*.parquet"), *out.glob("errors/*.parquet")]:
        found = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items()}
        assert found["eevp.format_version"] == "1"
        assert found["eevp.fingerprint"] == plan.fingerprint
        assert (found["eevp.model"], found["eevp.model_revision_or_hash"]) == ("tiny", "c0ffee")
        policy = json.loads(found["eevp.exit_policy"])
        assert policy["layers"] == [2, 4, 6], "the last layer is always there"
        assert (policy["threshold"], policy["confidence"]) == (0.7, "max_prob")
        assert (policy["kv"], policy["vocab.top_k"], policy["vocab.prune_layer"]) == (
            "propagate",
            256,
            2,
        )


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_parts_are_compressed_as_asked(tmp_path: Path, ids: list[str], compression: str) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", ids))
    output = spec.output.model_copy(update={"compression": compression})
    out = run(tmp_path, spec.model_copy(update={"output": output}))
    path = next(out.glob("data/*.parquet"))
    found = pq.read_metadata(path).row_group(0).column(0).compression
    assert found == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_all_columns_of_any_type_are_carried(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([5, 6]),
        "prompt": pa.array(["p", "q"], pa.large_string()),
        "group": pa.array(["x", None]).dictionary_encode(),
        "nested": pa.array([{"a": [1, None]}, None]),
        "when": pa.array([0, 1], pa.timestamp("us", "UTC")),
        "raw": pa.array([b"\xff", b""], pa.large_binary()),
        "nothing": pa.nulls(2),
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    plan = make_plan(spec := make_spec(tmp_path, input={"keep_columns": "all"}), MODEL)
    source = read_chunk(plan, plan.chunks[0], ["prompt"])
    fine, failed = results(plan, table_ids(source, plan, ""))
    data, errors = build_tables(plan, spec, plan.chunks[0], 1, source, fine, failed)
    schema = data.schema if data is not None else errors.schema
    assert str(schema.field("row_id").type) == "int64"
    assert data is not None, "at least one of the two rows is fine"
    assert data.column_names[2:8] == [name for name in columns if name != "id"]
    assert str(data.schema.field("prompt").type) == "string", "encodings are taken off"
    assert str(data.schema.field("group").type) == "string"
    kept = source.take([[5, 6].index(row_id) for row_id in data["row_id"].to_pylist()])
    for name in columns.keys() - {"id"}:
        assert data[name].to_pylist() == kept[name].to_pylist()


def test_text_that_utf8_cannot_hold_does_not_lose_the_chunk(tmp_path: Path) -> None:
    spec = make_spec(write_input(tmp_path / "in.parquet", ["a"]))
    plan = make_plan(spec, MODEL)
    source = read_chunk(plan, plan.chunks[0], [])
    odd = replace(generation("a"), text="odd \ud800 end")
    data, _ = build_tables(plan, spec, plan.chunks[0], 1, source, [odd], [])
    assert data["text"].to_pylist() == ["odd ? end"]
