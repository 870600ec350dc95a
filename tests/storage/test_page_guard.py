"""Page headers are read as pyarrow reads them, and pages that swell are refused before they do."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.errors import InputError, JobFailedError
from eevp_batch.storage import inputs, page_guard
from eevp_batch.storage.chunks import read_chunk
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.page_guard import ColumnRun, PageGuard, column_runs, read_header
from eevp_batch.storage.plan import Plan, make_plan
from tests.storage.jobs import MODEL, make_spec

NUM_ROWS = 3000
TABLE = pa.table(
    {
        "id": [f"row {row}" for row in range(NUM_ROWS)],
        "prompt": [f"{row % 7} " * (row % 50) for row in range(NUM_ROWS)],
        "long": ["x" * 5000 + str(row) for row in range(NUM_ROWS)],  # it stands in the headers
        "none": pa.nulls(NUM_ROWS, pa.string()),
        "talk": [[{"role": "user", "content": f"{row}"}] * (row % 4) for row in range(NUM_ROWS)],
    }
)
KINDS: list[dict[str, Any]] = [
    {"compression": compression, "data_page_version": version, **options}
    for compression, version, options in itertools.product(
        ["none", "snappy", "zstd"],
        ["1.0", "2.0"],
        [
            {"use_dictionary": False, "data_page_size": 1 << 12},
            {"row_group_size": 700, "dictionary_pagesize_limit": 1 << 12, "store_schema": False},
            {"write_page_index": True, "write_page_checksum": True, "data_page_size": 1 << 12},
        ],
    )
]


@pytest.fixture(params=KINDS, ids=str)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of every kind that pyarrow writes."""
    found = tmp_path / "in.parquet"
    pq.write_table(TABLE, found, **request.param)
    return found


def test_headers_add_up_to_what_the_footer_says(path: Path) -> None:
    file, source = InputParquet.open(str(path)), pa.OSFile(str(path))
    for group, runs in enumerate(file.runs):
        for leaf, run in enumerate(runs):
            column = file.metadata.row_group(group).column(leaf)
            position, uncompressed, values = run.start, 0, []
            while position < run.stop:
                header = read_header(source, position)
                position += header.num_bytes + header.compressed
                uncompressed += header.num_bytes + header.uncompressed
                values.append(header.num_values)
            assert position == run.stop, "the last page ends where the column does"
            assert uncompressed == column.total_uncompressed_size == run.uncompressed
            assert run.has_dictionary == column.has_dictionary_page
            assert sum(values[run.has_dictionary :]) == column.num_values
    assert len(file.runs) == file.metadata.num_row_groups


def test_a_guarded_file_is_read_as_any_other(path: Path) -> None:
    file = InputParquet.open(str(path))
    for columns in (["id"], ["talk", "prompt"], TABLE.column_names):
        batches = file.batches(columns, 100, 2500, 256)
        assert pa.Table.from_batches(batches).equals(TABLE.select(columns).slice(100, 2400))


def test_every_page_is_looked_at(path: Path) -> None:
    file = InputParquet.open(str(path))
    runs = [(run, False) for group in file.runs for run in group]
    guard = PageGuard(pa.OSFile(str(path)), runs)
    reader = pq.ParquetFile(guard, metadata=file.metadata, pre_buffer=False, buffer_size=1 << 12)
    assert not guard.is_through
    reader.read(use_threads=False)
    assert guard.is_through


def plan_of(path: Path) -> Plan:
    return make_plan(make_spec(path, chunk_rows=9, input={"keep_columns": []}), MODEL)


@pytest.mark.parametrize("column", ["id", "prompt"])
@pytest.mark.parametrize("kind", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}])
def test_a_page_that_swells_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, kind: dict[str, Any]
) -> None:
    monkeypatch.setattr(page_guard, "MAX_BATCH_BYTES", 8 << 20)
    path = tmp_path / "bomb.parquet"
    table = {"id": ["a"], "prompt": ["p"], column: ["x" * (9 << 20)]}
    pq.write_table(pa.table(table), path, compression="zstd", write_statistics=False, **kind)
    assert path.stat().st_size < 10_000
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises((InputError, JobFailedError), match=r"pages of 9,437,\d+ bytes, decompr"):
        read_chunk(plan := plan_of(path), plan.chunks[0], ["prompt"])
    assert pa.default_memory_pool().bytes_allocated() <= before, "nothing is held"


def test_lists_that_swell_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.parquet"
    many = pa.array([[None] * 5000, []], pa.list_(pa.string()))
    pq.write_table(pa.table({"id": ["a", "b"], "prompt": ["p", "q"], "more": many}), path)
    plan = plan_of(path)
    assert read_chunk(plan, plan.chunks[0], ["more"]).num_rows == 2
    monkeypatch.setattr(page_guard, "MAX_BATCH_VALUES", 5000)
    with pytest.raises(JobFailedError, match="lists of 5,001 values for few rows; at most 5,000"):
        read_chunk(plan, plan.chunks[0], ["more"])
    assert read_chunk(plan, plan.chunks[0], ["prompt"]).num_rows == 2, "it was not asked for"


def batch_rows(path: Path) -> set[int]:
    file = InputParquet.open(str(path))
    return {batch.num_rows for batch in file.batches(["prompt"], 0, file.num_rows, 256)}


def test_long_rows_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_BATCH_BYTES", 1 << 20)
    path = tmp_path / "in.parquet"
    plain = pa.table({"prompt": ["x" * (100 << 10)] * 20})
    pq.write_table(plain, path, use_dictionary=False)
    assert batch_rows(path) == {10}, "as many as come to a mebibyte"
    pq.write_table(plain, path)
    assert batch_rows(path) == {10}, "a dictionary may say the same text each time"
    pq.write_table(pa.table({"prompt": ["x"] * 512}), path)
    assert batch_rows(path) == {256}


def test_columns_do_not_lie_over_each_other() -> None:
    runs = [ColumnRun(100, 200, 9, False), ColumnRun(4, 101, 9, False)]
    with pytest.raises(pa.ArrowInvalid, match="lie over each other"):
        PageGuard(pa.BufferReader(b""), [(run, False) for run in runs])


@given(st.binary(max_size=60) | st.lists(st.sampled_from(b"\x15\x2c\x1c\x00\xff\x08")).map(bytes))
def test_bytes_that_are_no_header_are_refused(content: bytes) -> None:
    try:
        header = read_header(pa.BufferReader(content), 0)
    except pa.ArrowInvalid:
        return
    assert min(header) >= 0 and header.num_bytes <= len(content)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_footer_are_refused(content: bytes) -> None:
    for read in (page_guard.num_columns_said, column_runs):
        with contextlib.suppress(pa.ArrowInvalid):
            read(content)


def test_headers_without_end_are_refused() -> None:
    nested = b"\x1c" * 100_000  # structs in structs
    endless = b"\x18\xff\xff\xff\xff\x0f"  # a text of 4 GiB
    for content in (nested, endless, b"\x15" + b"\xff" * 100):
        with pytest.raises(pa.ArrowInvalid, match=r"without end|page header|64 bits"):
            read_header(pa.BufferReader(content), 0)


def test_a_header_that_says_less_than_the_page_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a"] * 99, "prompt": ["p"] * 99}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    for start in (run.start for group in InputParquet.open(str(path)).runs for run in group):
        # Fields 1 to 3 are integers of one or two bytes: kind, uncompressed, compressed size.
        assert content[start] == 0x15 and content[start + 2] == 0x15
        content[start + 3] = 2  # one byte
    path.write_bytes(content)
    with pytest.raises((InputError, JobFailedError), match="cannot be read"):
        read_chunk(plan := plan_of(path), plan.chunks[0], ["prompt"])
