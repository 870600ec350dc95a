from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import JobFailedError
from eevp_batch.report.row_sample import RowSample, sample_rows
from eevp_batch.report.vocabulary import Vocabulary
from eevp_batch.storage.plan import read_plan
from eevp_batch.storage.store import Store
from tests.report.outputs import make_output
from tests.storage.jobs import make_spec, run_job, write_input

LAYERS = [2, 4, 6]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Store:
    return make_output(tmp_path_factory.mktemp("sampled"), tiny_llama)


def sample(store: Store, vocabulary: Vocabulary | None = None, max_rows: int = 10**6) -> RowSample:
    parts = [f"data/{name}" for name in store.list("data")]
    columns = read_plan(store).kept_columns
    return sample_rows(store, parts, columns, LAYERS, vocabulary, max_rows)


def rows_of(store: Store) -> list[dict[str, object]]:
    return pq.read_table(Path(store.text) / "data").to_pylist()


def test_exits_by_position_are_those_of_the_rows(store: Store) -> None:
    found = sample(store)
    expected = Counter(
        (place, layer) for row in rows_of(store) for place, layer in enumerate(row["exit_layers"])
    )
    counted = {
        (place, LAYERS[column]): int(found.by_position[place, column])
        for place, column in zip(*np.nonzero(found.by_position), strict=True)
    }
    assert counted == expected
    assert found.tokens == found.by_position.sum() == sum(expected.values())


def test_every_token_has_a_class(store: Store, tiny_llama: Path) -> None:
    found = sample(store, Vocabulary.read(tiny_llama))
    assert found.by_class is not None
    assert (found.by_class.sum(axis=0) == found.by_position.sum(axis=0)).all()
    assert sample(store).by_class is None, "without a tokenizer nothing is guessed"


def test_columns_with_few_values_are_groups_and_others_are_named(store: Store) -> None:
    found = sample(store)
    assert found.many_valued == ["topic"] and set(found.by_column) == {"task"}
    for value, group in found.by_column["task"].items():
        rows = [row for row in rows_of(store) if row["task"] == value]
        layers = [layer for row in rows for layer in row["exit_layers"]]
        assert (group.rows, group.tokens) == (len(rows), len(layers))
        assert group.mean_exit_layer == pytest.approx(np.mean(layers))
        assert group.exits.tolist() == [layers.count(layer) for layer in LAYERS]


def test_an_audited_row_is_compared_up_to_its_first_difference(store: Store) -> None:
    found = sample(store)
    audited = [row for row in rows_of(store) if row["audit_token_ids"] is not None]
    diverged = [row for row in audited if row["audit_first_divergence"] is not None]
    assert 0 < len(diverged) < len(audited) == found.audited
    assert found.agrees.count(False) == len(diverged)
    seen = 6 * len(diverged) + sum(
        len(row["token_ids"]) for row in audited if row["audit_first_divergence"] is None
    )
    assert len(found.agrees) == len(found.confidences) == len(found.layers) == seen


def test_a_limit_reads_some_parts_the_same_every_time(store: Store) -> None:
    once, again = sample(store, max_rows=5), sample(store, max_rows=5)
    assert (once.parts, once.parts_total) == (2, 6), "whole parts, until there are enough rows"
    assert 5 <= once.rows < 10
    assert [row["row_id"] for row in once.shown] == [row["row_id"] for row in again.shown]


def test_shown_and_longest_rows_are_rows_of_the_output(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"row-{number}" for number in range(400)])
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(source, chunk_rows=50, token_stats=False))
    found = sample(store)
    rows = {row["row_id"]: row for row in rows_of(store)}
    assert len({row["row_id"] for row in found.shown}) == 48
    assert len({row["chunk_id"] for row in found.shown}) == 8, "from all over the output"
    lengths = sorted((row["generated_tokens"] for row in rows.values()), reverse=True)
    assert [row["generated_tokens"] for row in found.longest] == lengths[:10]
    assert all(rows[row["row_id"]]["text"] == row["text"] for row in found.shown)
    assert not found.has_exits and found.by_column["task"]["task 0"].exits is None
    assert found.by_column["task"]["task 0"].mean_exit_layer is not None


def test_columns_of_any_type_may_be_kept(tmp_path: Path) -> None:
    ids = [f"row-{number}" for number in range(12)]
    path = write_input(tmp_path / "in.parquet", ids)
    kept = {
        "flag": pa.array([True, None] * 6),
        "level": pa.array([1, 2, 3] * 4, pa.int8()),
        "at": pa.array(range(12), pa.timestamp("ns", "UTC")),
        "blob": pa.array([b"\xff"] * 12),
        "nothing": pa.nulls(12),
        "tags": pa.array([["a"]] * 12),
    }
    pq.write_table(pa.table({"id": ids, "prompt": ids, **kept}), path)
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(path, input={"keep_columns": list(kept)}))
    found = sample(store)
    assert set(found.by_column) == {"flag", "level"}
    assert set(found.by_column["flag"]) == {"True", "(null)"}
    assert found.many_valued == ["at", "blob", "nothing", "tags"] and found.shown


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(JobFailedError, match="part-00000"):
        sample_rows(Store.open(tmp_path), ["part-00000.parquet"], [], LAYERS, None)
