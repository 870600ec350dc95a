"""Parquet files made to mislead: each is refused with its name, or read within bounds."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.errors import InputError, JobFailedError
from eevp_batch.storage import chunks, inputs
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.plan import Plan, make_plan
from eevp_batch.storage.scan import MAX_ID_BYTES
from tests.storage.jobs import MODEL, make_spec

NUM_ROWS = 20
TABLE = pa.table({"id": [f"r{row}" for row in range(NUM_ROWS)], "prompt": ["p"] * NUM_ROWS})

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_table(content: Any, **options: Any) -> Path:
        path = tmp_path / "in.parquet"
        if isinstance(content, bytes | bytearray):
            path.write_bytes(content)
        else:
            table = content if isinstance(content, pa.Table) else pa.table(content)
            pq.write_table(table, path, **options)
        return path

    return write_table


def plan_of(path: Path, chunk_rows: int = 7) -> Plan:
    return make_plan(make_spec(path, chunk_rows=chunk_rows, input={"keep_columns": []}), MODEL)


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    return [row for chunk in plan.chunks for row in iter_rows(read_chunk(plan, chunk, ["prompt"]))]


def footer_of(content: bytes) -> range:
    """Where the file metadata stands in a file."""
    length = int.from_bytes(content[-8:-4], "little")
    return range(len(content) - 8 - length, len(content) - 8)


def with_row_counts(content: bytes, num_rows: int) -> list[bytearray]:
    """The file with one, or both, of the two places that count its rows overwritten.

    Counts are zigzag varints: a count of up to 63 is one byte of twice its value.
    """
    places = []
    for place in footer_of(content):
        changed = bytearray(content)
        if changed[place] != 2 * NUM_ROWS:
            continue
        changed[place] = 2 * num_rows
        try:
            metadata = pq.read_metadata(pa.BufferReader(bytes(changed)))
        except OSError:
            continue
        groups = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        if metadata.num_rows != groups:
            places.append(place)
    assert len(places) == 2, "of the file and of its row group"
    changes = []
    for chosen in ([places[0]], [places[1]], places):
        changed = bytearray(content)
        for place in chosen:
            changed[place] = 2 * num_rows
        changes.append(changed)
    return changes


def test_a_footer_that_counts_rows_that_are_not_there_is_refused(write: Write) -> None:
    content = write(TABLE).read_bytes()
    one, other, both = with_row_counts(content, NUM_ROWS + 1)
    for changed in (one, other):
        with pytest.raises(InputError, match=r"a footer that says \d+ rows, but \d+ in its row"):
            plan_of(write(changed))
    with pytest.raises(InputError, match="20 rows in its pages, 21 in its footer"):
        plan_of(write(both))


def test_prompts_that_end_before_the_ids_do_fail_the_chunk(write: Write) -> None:
    # The ids are dense enough to be checked at the plan, the prompts only when they are read.
    plan = plan_of(write(TABLE), chunk_rows=NUM_ROWS)
    short = InputParquet.open(str(write(TABLE.slice(0, 15))))
    with pytest.raises(InputError, match="15 rows in its pages, 15 in its footer"):
        list(short.batches(["prompt"], 0, plan.num_rows, 4))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pages_are_told_at_the_plan(write: Write, seed: int) -> None:
    content = bytearray(write(TABLE, compression="zstd").read_bytes())
    for place in range(20 + seed, 60, 4):
        content[place] ^= 0xFF
    with pytest.raises(InputError, match=r"in\.parquet: input\.path: found pages that cannot"):
        plan_of(write(content))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda content: content[:-4] + b"PARE", "an encrypted Parquet file"),
        (lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1", "cut short"),
        (lambda content: content[: len(content) // 2], "not a Parquet file"),
        (lambda content: content[:-60] + bytes(52) + content[-8:], "readable Parquet file"),
    ],
)
def test_damaged_footers_are_refused(
    write: Write, change: Callable[[bytes], bytes], found: str
) -> None:
    with pytest.raises(InputError, match=found):
        plan_of(write(change(write(TABLE).read_bytes())))


def test_wide_files_are_refused_in_few_words(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**{f"c{i}": [1] for i in range(50)}, "id": ["a"], "prompt": ["p"]}
    with pytest.raises(InputError, match=r"allowed: one of c0, .*, c19 and 31 more$"):
        plan_of(write({name: values for name, values in wide.items() if name != "id"}))
    monkeypatch.setattr(inputs, "MAX_COLUMNS", 51)
    with pytest.raises(InputError, match="52 columns, more than 51"):
        plan_of(write(wide))
    monkeypatch.setattr(inputs, "MAX_FOOTER_BYTES", 1000)
    with pytest.raises(InputError, match=r"a footer of [\d,]+ bytes, more than 1,000"):
        plan_of(write({**wide, "more": [1]}))


def test_a_million_columns_are_counted_before_the_footer_is_parsed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = pa.schema([(f"{number:x}", pa.int8()) for number in range(1 << 17)])
    path = write(schema.empty_table(), store_schema=False)
    content = path.read_bytes()
    assert len(footer_of(content)) < inputs.MAX_FOOTER_BYTES, "it is not refused for its length"

    def parse(source: Any) -> None:
        raise AssertionError("parsing it takes seconds and gigabytes")

    monkeypatch.setattr(pq, "read_metadata", parse)
    with pytest.raises(InputError, match="131,073 columns and groups, more than 40,000"):
        plan_of(path)


def test_a_name_of_a_megabyte_is_told_in_part(write: Write) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(write({"x" * (1 << 20): [1]}))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_text_that_a_dictionary_repeats_is_counted_as_often(
    write: Write, monkeypatch: pytest.MonkeyPatch, store_schema: bool
) -> None:
    text = pa.array(["x" * (1 << 20)]).dictionary_encode()
    table = pa.table({"id": range(4000), "prompt": text.take(pa.array([0] * 4000))})
    path = write(table, store_schema=store_schema)
    assert path.stat().st_size < 1 << 20, "a few kilobytes that are 4 GB of text"
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 300 << 20)
    plan = plan_of(path, chunk_rows=4000)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(JobFailedError, match=r"run\.chunk_rows: found a chunk whose rows take mo"):
        read_chunk(plan, plan.chunks[0], ["prompt"])
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    assert grown_mib < 2000


def test_ids_are_any_text_but_endless(write: Write) -> None:
    ids = ["a/b", "../../etc/passwd", "two\nlines", "nul\0", "", " ", "ü😀", "x" * MAX_ID_BYTES]
    plan = plan_of(write({"id": ids, "prompt": ids}))
    assert [row["id"] for row in rows_of(plan)] == ids
    with pytest.raises(InputError, match="an id of 65,537 bytes in row 1; allowed: at most 65,536"):
        plan_of(write({"id": ["a", "x" * (MAX_ID_BYTES + 1)], "prompt": ["p", "p"]}))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_every_kind_of_text_is_read_as_text(write: Write, kind: Any) -> None:
    column = pa.array(["one", "two"]).cast(kind)
    plan = plan_of(write({"id": column, "prompt": column}))
    assert rows_of(plan) == [{"id": text, "prompt": text} for text in ("one", "two")]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"a", b"b"], pa.binary()),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([["a"], ["b"]]),
        pa.array([1.0, 2.0]),
        pa.array([True, False]),
        pa.array([None, None]),
        pa.array([0, 1], pa.timestamp("us")),
        pa.array([b"0123456789abcdef"] * 2, pa.binary(16)),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["id", "prompt"])
def test_other_kinds_are_refused_by_name(write: Write, column: Any, name: str) -> None:
    table = {"id": ["a", "b"], "prompt": ["p", "q"], name: column}
    with pytest.raises(InputError, match=rf"input\.{name}_column: found column '{name}' of type"):
        plan_of(write(table))


def test_a_file_without_row_groups_gives_no_rows(write: Write) -> None:
    with pytest.raises(InputError, match="found no rows in any file"):
        plan_of(write(TABLE.slice(0, 0)))
