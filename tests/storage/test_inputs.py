"""Reading a chunk touches only what it needs, and a file that changed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import InputError, JobFailedError
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.plan import make_plan
from tests.storage.jobs import MODEL, make_spec, write_input


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and no footer PAR1", b"a" * 100])
def test_what_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="allowed: a readable Parquet file"):
        InputParquet.open(str(path))


# --- reading a chunk ---------------------------------------------------------------------


def overwrite_columns(path: Path, spare: set[tuple[int, str]]) -> None:
    """Destroy every column chunk but the (row group, column) pairs in `spare`; keep the footer."""
    metadata = pq.read_metadata(path)
    content = bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if (group, column.path_in_schema) not in spare:
                start = column.dictionary_page_offset or column.data_page_offset
                size = column.total_compressed_size
                content[start : start + size] = b"\xff" * size
    path.write_bytes(bytes(content))


def test_only_the_needed_columns_and_row_groups_are_read(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in.parquet", [f"r{n}" for n in range(20)], row_group_rows=5)
    plan = make_plan(make_spec(path, chunk_rows=4, input={"keep_columns": []}), MODEL)
    overwrite_columns(path, {(1, "id"), (1, "prompt"), (2, "id"), (2, "prompt")})
    read = read_chunk(plan, plan.chunks[2], ["prompt"])
    assert read["id"].to_pylist() == ["r8", "r9", "r10", "r11"], "rows 8 to 11, of two row groups"
    assert read.column_names == ["id", "prompt"]
    for chunk, columns in ((plan.chunks[0], []), (plan.chunks[2], ["task"])):
        with pytest.raises(JobFailedError, match=r"in\.parquet"):
            read_chunk(plan, chunk, columns)


def test_columns_come_once_in_order_whatever_their_names(tmp_path: Path) -> None:
    columns = {
        "a.b": ["dotted", "x"],
        "id": [1, 2],
        "a": [{"b": 1}, {"b": 2}],
        "nested.x.y": [[1, 2], []],
        "prompt": ["p", "q"],
        "spaced name ü": [True, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    keep = ["nested.x.y", "spaced name ü", "a"]
    plan = make_plan(make_spec(tmp_path, input={"keep_columns": keep}), MODEL)
    read = read_chunk(plan, plan.chunks[0], ["prompt", "a", "id"])
    assert read.column_names == ["id", *keep, "prompt"]
    assert read.to_pydict() == {name: columns[name] for name in ["id", *keep, "prompt"]}


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    plan = make_plan(make_spec(write_input(tmp_path / "in.parquet", ["a"])), MODEL)
    with pytest.raises(JobFailedError, match="no column 'context'; allowed: one of id, prompt"):
        read_chunk(plan, plan.chunks[0], ["context"])


@pytest.mark.parametrize("change", ["ids", "prompts", "fewer", "gone", "garbage"])
def test_an_input_that_changed_after_planning_is_refused(tmp_path: Path, change: str) -> None:
    ids = [f"r{n}" for n in range(9)]
    path = write_input(tmp_path / "in.parquet", ids)
    plan = make_plan(make_spec(path), MODEL)
    assert read_chunk(plan, plan.chunks[1], ["prompt"]).num_rows == 4
    if change == "ids":
        write_input(path, [f"s{n}" for n in range(9)])
    elif change == "prompts":
        columns = pq.read_table(path).to_pydict()
        pq.write_table(pa.table(columns | {"prompt": ["another"] * 9}), path, row_group_size=7)
    elif change == "fewer":
        write_input(path, ids[:5])
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"garbage")
    with pytest.raises(JobFailedError, match=r"in\.parquet"):
        read_chunk(plan, plan.chunks[1], ["prompt"])


def test_rows_arrive_as_dicts_and_broken_text_as_none(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")
    )
    rows: list[Any] = list(iter_rows(pa.table({"id": ["a", "b"], "prompt": broken})))
    assert rows == [{"id": "a", "prompt": "ok"}, {"id": "b", "prompt": None}]
