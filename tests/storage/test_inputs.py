"""Which files a job names, and that reading a chunk touches only what it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import InputError, JobFailedError, UsageError
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.inputs import InputParquet, list_inputs
from eevp_batch.storage.plan import make_plan
from tests.storage.jobs import MODEL, make_spec, write_input

NAMES = [
    "b.parquet",
    "a b.parquet",
    "c#d.parquet",
    "100%.parquet",
    "%41.parquet",
    "ü.parquet",
    "[x].parquet",
    "q?.parquet",
    "deep/e.parquet",
    "deep/er/f.parquet",
    "notes.txt",
    ".hidden.parquet",
    "_meta.parquet",
    "_temp/g.parquet",
    "deep/.h/i.parquet",
]
VISIBLE = [
    "%41.parquet",
    "100%.parquet",
    "[x].parquet",
    "a b.parquet",
    "b.parquet",
    "c#d.parquet",
    "deep/e.parquet",
    "deep/er/f.parquet",
    "q?.parquet",
    "ü.parquet",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "in #1 50% ü" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "in #1 50% ü"


def found(folder: Path, paths: str | Sequence[str]) -> list[str]:
    return [os.path.relpath(path, folder) for path in list_inputs(paths)]


def test_a_folder_gives_its_parquet_files_sorted(folder: Path) -> None:
    assert found(folder, str(folder)) == VISIBLE
    assert len(list_inputs(folder.as_uri())) == len(VISIBLE), "a URI finds the same"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".parquet")])
def test_a_file_is_taken_literally(folder: Path, name: str) -> None:
    assert found(folder, f"{folder}/{name}") == [name]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[bc]*.parquet", ["b.parquet", "c#d.parquet"]),
        ("?.parquet", ["b.parquet", "ü.parquet"]),
        ("deep/**/*.parquet", ["deep/e.parquet", "deep/er/f.parquet"]),
        ("*/*.parquet", ["_temp/g.parquet", "deep/e.parquet"]),
        ("**/f.*", ["deep/er/f.parquet"]),
        (".h*.parquet", [".hidden.parquet"]),
        ("*%*.parquet", ["%41.parquet", "100%.parquet"]),
    ],
)
def test_patterns_match_as_in_a_shell(folder: Path, pattern: str, expected: list[str]) -> None:
    assert found(folder, f"{folder}/{pattern}") == expected
    uri = folder.as_uri()
    texts = list_inputs(f"{uri}/{quote(pattern)}")
    assert [InputLocation(text).relative_to(folder) for text in texts] == expected, (
        "a URI matches the same files"
    )


class InputLocation:
    """Where a URI points, by pyarrow's own reading of it."""

    def __init__(self, text: str) -> None:
        assert text.startswith("file://"), "a URI stays a URI"
        self.path = pa.fs.FileSystem.from_uri(text)[1]

    def relative_to(self, folder: Path) -> str:
        return os.path.relpath(self.path, folder)


def test_a_list_keeps_its_order_and_names_each_file_once(folder: Path) -> None:
    paths = [f"{folder}/ü.parquet", f"{folder}/[bü]*.parquet", f"{folder}/a b.parquet"]
    assert found(folder, paths) == ["ü.parquet", "b.parquet", "a b.parquet"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.parquet", "no such file or folder"),
        ("z*.parquet", "a pattern that matches no file"),
        ("absent/*.parquet", "a pattern that matches no file"),
        ("empty", "a folder without *.parquet files"),
    ],
)
def test_what_names_no_file_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    for text in (f"{folder}/{name}", f"{folder.as_uri()}/{name}"):
        with pytest.raises(InputError) as caught:
            list_inputs(text)
        assert str(caught.value).startswith(f"{text}: input.path: found {message}; allowed: ")


def test_a_secret_in_an_input_uri_is_refused_unseen() -> None:
    with pytest.raises(UsageError) as caught:
        list_inputs("s3://me:hunter2@bucket/in/*.parquet")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["?.parquet", "a#b.parquet"])
def test_what_a_uri_would_drop_silently_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="bare # or"):
        list_inputs(f"{folder.as_uri()}/{name}")


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
