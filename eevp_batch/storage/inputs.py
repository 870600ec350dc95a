"""One input Parquet file: its footer, and reading a run of rows of some of its columns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from eevp_batch.errors import InputError
from eevp_batch.storage.location import locate
from eevp_batch.storage.page_guard import (
    ColumnRun,
    PageGuard,
    column_runs,
    num_columns_said,
    read_header,
)
from eevp_batch.storage.retries import Patience, keep_trying

ALLOWED = "a Parquet file, a folder of them, a glob, a list of these, or a URI"
PATIENCE = Patience()
_MAGIC, _ENCRYPTED = b"PAR1", b"PARE"
MAX_FOOTER_BYTES = 32 << 20
"""Largest footer that is parsed: parsing takes 0.1 s and 30 MiB for each MiB."""
MAX_COLUMNS = 10_000
"""Most columns of a file, nested ones counted."""
# A list of structs has three groups around its columns.
_GROUPS_A_COLUMN = 4
# What pyarrow raises for a damaged file; a name in it may not be UTF-8.
UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError)
# Pages are read through a buffer of this size, so that a chunk of a huge row group does not load
# all of it.
_READ_BUFFER_BYTES = 1 << 20
# What the rows of a batch may come to, going by the footer and by the longest text that a
# dictionary may hold; beyond that, batches have fewer rows. The guard has the last word.
_BATCH_BYTES = 128 << 20
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class InputParquet:
    """One opened Parquet file.

    Attributes:
        text: its local path or URI.
        footer_hash: hex sha256 of its footer, which names every page's place, size and statistics.
        runs: where the pages of each row group's columns stand.
    """

    text: str
    filesystem: Any
    path: str
    metadata: Any
    schema: Any
    footer_hash: str
    runs: list[list[ColumnRun]]

    @classmethod
    def open(cls, text: str) -> InputParquet:
        """Read the footer of a file.

        Raises:
            InputError: it is missing, unreadable or not Parquet.
        """
        location = locate(text)
        info = patiently(text, partial(location.filesystem.get_file_info, location.path))
        if info.type != pa.fs.FileType.File:
            raise InputError(text, "input.path", "no such file", ALLOWED)
        try:
            return patiently(text, partial(_open, text, info.size, info.mtime_ns))
        except UNREADABLE as error:
            found = str(error).strip()
            raise InputError(text, "input.path", found, "a readable Parquet file") from error

    @property
    def num_rows(self) -> int:
        return int(self.metadata.num_rows)

    def batches(
        self, columns: Sequence[str], start: int, stop: int, batch_rows: int
    ) -> Iterator[Any]:
        """Record batches of rows `start` to `stop` of some top-level columns, in file order.

        Row groups outside the run are skipped, and inside one only the pages up to `stop` are
        decoded. Memory holds one batch, and its pages; where rows are long, a batch has fewer.

        Raises:
            InputError: the pages hold fewer rows than the footer says.
            OSError, pa.ArrowException: they cannot be read; see `UNREADABLE`.
        """
        read = yield from self._batches(columns, start, stop, batch_rows)
        if read < stop:
            found = f"{read} rows in its pages, {self.num_rows} in its footer"
            raise InputError(self.text, "input.path", found, "as many in both")

    def _batches(
        self, columns: Sequence[str], start: int, stop: int, batch_rows: int
    ) -> Generator[Any, None, int]:
        """The batches; returns the number of the row after the last one that was read."""
        groups, position = self._row_groups(start, stop)
        leaves = self._leaves(columns)
        with self.filesystem.open_input_file(self.path) as source:
            guard = PageGuard(source, self._guarded(groups, leaves))
            file = pq.ParquetFile(
                guard,
                metadata=self.metadata,
                pre_buffer=False,
                buffer_size=_READ_BUFFER_BYTES,
            )
            at_once = min(batch_rows, self._rows_at_once(source, groups, leaves))
            for batch in file.iter_batches(
                batch_size=at_once, row_groups=groups, columns=columns, use_threads=False
            ):
                guard.begin_batch()
                skip = max(start - position, 0)
                keep = min(stop - position, batch.num_rows) - skip
                position += batch.num_rows
                if keep > 0:
                    # A name such as "a" also selects the nested "a.b"; only the asked columns go
                    # on.
                    yield batch.slice(skip, keep).select(columns)
                if position >= stop:
                    break
        return position

    def _leaves(self, columns: Sequence[str]) -> list[int]:
        """Numbers of the columns, nested ones counted, that pyarrow reads for some names."""
        names, inside = set(columns), tuple(f"{name}." for name in columns)
        paths = (
            self.metadata.schema.column(leaf).path for leaf in range(self.metadata.num_columns)
        )
        return [leaf for leaf, p in enumerate(paths) if p in names or p.startswith(inside)]

    def _guarded(
        self, groups: Sequence[int], leaves: Sequence[int]
    ) -> Iterator[tuple[ColumnRun, bool]]:
        for leaf in leaves:
            is_list = self.metadata.schema.column(leaf).max_repetition_level > 0
            for group in groups:
                yield self.runs[group][leaf], is_list

    def _rows_at_once(self, source: Any, groups: Sequence[int], leaves: Sequence[int]) -> int:
        """Rows that a batch may have, one at least."""
        largest = 1
        for group in groups:
            runs = [self.runs[group][leaf] for leaf in leaves]
            num_rows = self.metadata.row_group(group).num_rows
            a_row = sum(run.uncompressed for run in runs) // max(1, num_rows)
            dictionaries = (read_header(source, run.start) for run in runs if run.has_dictionary)
            largest = max(largest, a_row, *(header.uncompressed for header in dictionaries))
        return max(1, _BATCH_BYTES // largest)

    def _row_groups(self, start: int, stop: int) -> tuple[list[int], int]:
        """The row groups that hold rows `start` to `stop`, and the first row of the first one."""
        groups: list[int] = []
        first = end = 0
        for index in range(self.metadata.num_row_groups):
            begin, end = end, end + self.metadata.row_group(index).num_rows
            if begin < stop and start < end:
                first = first if groups else begin
                groups.append(index)
        return groups, first


def patiently(text: str, operation: Callable[[], _Answer]) -> _Answer:
    """Read from an input file, again where an error may pass.

    Args:
        text: names it.
        operation: reads.

    Raises:
        OSError: it cannot be read.
    """
    return keep_trying(operation, f"reading {text}", PATIENCE)


@lru_cache(maxsize=8)
def _open(text: str, size: int, mtime_ns: int) -> InputParquet:
    """Read a footer once; size and time are in the key, so that a changed file is read again."""
    location = locate(text)
    with location.filesystem.open_input_file(location.path) as source:
        footer = _read_footer(source, size)
        _refuse_wide(num_columns_said(footer), "columns and groups", MAX_COLUMNS * _GROUPS_A_COLUMN)
        metadata = pq.read_metadata(pa.BufferReader(footer))
        _check_footer(metadata)
        runs = column_runs(footer)
        if any(len(group) != metadata.num_columns for group in runs):
            raise pa.ArrowInvalid("a row group that lacks columns")
        schema = pq.ParquetFile(source, metadata=metadata).schema_arrow
    return InputParquet(
        text=text,
        filesystem=location.filesystem,
        path=location.path,
        metadata=metadata,
        schema=schema,
        footer_hash=hashlib.sha256(footer).hexdigest(),
        runs=runs,
    )


def _read_footer(source: Any, size: int) -> bytes:
    """The file metadata, its length and the magic number: the last bytes of every Parquet file."""
    tail = bytes(source.read_at(min(size, 8), max(size - 8, 0)))
    if tail[4:] == _ENCRYPTED:
        raise pa.ArrowInvalid("an encrypted Parquet file")
    if tail[4:] != _MAGIC:
        raise pa.ArrowInvalid("not a Parquet file: it does not end with PAR1")
    num_bytes = int.from_bytes(tail[:4], "little") + 8
    if num_bytes > size:
        raise pa.ArrowInvalid("a Parquet file cut short: its footer is longer than the file")
    if num_bytes > MAX_FOOTER_BYTES:
        raise pa.ArrowInvalid(f"a footer of {num_bytes:,} bytes, more than {MAX_FOOTER_BYTES:,}")
    return bytes(source.read_at(num_bytes, size - num_bytes))


def _check_footer(metadata: Any) -> None:
    """Refuse a footer that is not to be believed, or too wide to work with.

    Raises:
        pa.ArrowInvalid: says why.
    """
    _refuse_wide(metadata.num_columns, "columns", MAX_COLUMNS)
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise pa.ArrowInvalid(
            f"a footer that says {metadata.num_rows} rows, but {sum(groups)} in its row groups"
        )


def _refuse_wide(number: int, what: str, most: int) -> None:
    if number > most:
        raise pa.ArrowInvalid(f"{number:,} {what}, more than {most:,}")
