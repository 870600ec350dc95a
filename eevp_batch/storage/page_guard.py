"""What a Parquet file says of its size, seen before anything of that size is made.

A few kilobytes can be a page of 2 GiB, and a footer says nothing of pages that can be relied on.
So the reader is given a file that looks at every page header which passes through it, and a footer
is asked for its number of columns before it is parsed. Knows headers only: what stands in a page is
pyarrow's business.

The format: https://github.com/apache/parquet-format (`PageHeader` and `FileMetaData` in
parquet.thrift).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from eevp_batch.storage.thrift import Compact

MAX_BATCH_BYTES = 512 << 20
"""Most bytes of pages, decompressed, that are begun for one batch of rows."""
MAX_BATCH_VALUES = 16 << 20
"""Most values of lists in pages that are begun for one batch of rows."""
MAX_HEADER_BYTES = 16 << 20
"""Longest page header: it may hold the smallest and the largest value. pyarrow's own limit."""
_FIRST_READ_BYTES = 1 << 10
# Numbers of fields: of a footer, a row group and a column in it, ...
_SCHEMA, _GROUPS, _COLUMNS, _COLUMN = 2, 4, 1, 3
_UNCOMPRESSED_TOTAL, _COMPRESSED_TOTAL, _DATA_PAGE, _DICTIONARY_PAGE = 6, 7, 9, 11
# ... and of a page header. The parts for each kind of page all begin with num_values.
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _KINDS = 2, 3, (5, 7, 8)


class PageHeader(NamedTuple):
    """What a page says of itself.

    Attributes:
        num_bytes: of the header.
        compressed, uncompressed: bytes of the page after it.
        num_values: values in it, nulls included.
    """

    num_bytes: int
    compressed: int
    uncompressed: int
    num_values: int


class ColumnRun(NamedTuple):
    """Where the pages of one column of a row group stand, one after another.

    Attributes:
        start, stop: bytes of the file.
        uncompressed: bytes of all of them, as the footer has it.
        has_dictionary: whether the first one is a dictionary.
    """

    start: int
    stop: int
    uncompressed: int
    has_dictionary: bool


def num_columns_said(footer: bytes) -> int:
    """Columns in a footer's schema, nested ones and the groups around them counted.

    Args:
        footer: of the file; not parsed further than to that number.

    Raises:
        pa.ArrowInvalid: it does not begin as a footer does.
    """
    try:
        return Compact(footer).length_of_list(_SCHEMA)
    except IndexError as error:
        raise pa.ArrowInvalid("a footer that ends before its schema") from error


def column_runs(footer: bytes) -> list[list[ColumnRun]]:
    """The runs of a file, by row group and number of the column, nested ones counted.

    Args:
        footer: of the file, without its length.

    Raises:
        pa.ArrowInvalid: it is damaged.
    """
    try:
        groups = Compact(footer).struct().get(_GROUPS) or []
        return [[_run(column[_COLUMN]) for column in group[_COLUMNS]] for group in groups]
    except (IndexError, KeyError, TypeError) as error:
        raise pa.ArrowInvalid(f"a damaged footer: {error!r}") from error


def _run(column: dict[int, Any]) -> ColumnRun:
    start, dictionary = column[_DATA_PAGE], column.get(_DICTIONARY_PAGE) or 0
    has_dictionary = 0 < dictionary < start
    start = dictionary if has_dictionary else start
    stop = start + column[_COMPRESSED_TOTAL]
    return ColumnRun(start, stop, column[_UNCOMPRESSED_TOTAL] + 0, has_dictionary)


@dataclass
class _Seen:
    """How far a run has been looked at."""

    stop: int
    is_list: bool
    next_header: int


class PageGuard:
    """A file, opened to be read, that refuses pages which are too large together.

    Args:
        source: the file; pyarrow.NativeFile.
        runs: the columns that are going to be read, each with whether a row may have many values of
            it; other parts of the file are not looked at.

    Raises:
        pa.ArrowInvalid: columns lie over each other.
    """

    def __init__(self, source: Any, runs: Iterable[tuple[ColumnRun, bool]]) -> None:
        self._source = source
        in_order = sorted(runs)
        self._starts = [run.start for run, _ in in_order]
        self._runs = [_Seen(run.stop, is_list, run.start) for run, is_list in in_order]
        for seen, start in zip(self._runs, self._starts[1:], strict=False):
            if seen.stop > start:
                raise pa.ArrowInvalid("columns whose pages lie over each other")
        self.begin_batch()

    def begin_batch(self) -> None:
        """Another batch of rows is going to be read."""
        self._num_bytes = self._num_values = 0

    @property
    def is_through(self) -> bool:
        """Whether every page was looked at."""
        return all(seen.next_header == seen.stop for seen in self._runs)

    def read(self, num_bytes: int = -1) -> bytes:
        """Read on, having looked at the headers in what was read.

        Raises:
            pa.ArrowInvalid: they announce too much, or cannot be read.
        """
        start = self._source.tell()
        content: bytes = self._source.read(None if num_bytes < 0 else num_bytes)
        stop = start + len(content)
        first = max(0, bisect_right(self._starts, start) - 1)
        for seen in self._runs[first : bisect_right(self._starts, stop)]:
            while seen.next_header < min(stop, seen.stop):
                at = seen.next_header - start
                self._look(seen, content[at : at + _FIRST_READ_BYTES] if at >= 0 else b"")
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        return int(self._source.seek(offset, whence))

    def tell(self) -> int:
        """As of any file."""
        return int(self._source.tell())

    def size(self) -> int:
        """Bytes of the file."""
        return int(self._source.size())

    @property
    def closed(self) -> bool:
        """As of any file."""
        return bool(self._source.closed)

    def close(self) -> None:
        """Leave the file to who opened it."""

    def _look(self, seen: _Seen, content: bytes) -> None:
        """Look at a run's next header, which `content` begins with, as far as it was read."""
        header = _parsed(content)
        if header is None:
            position = self._source.tell()
            header = read_header(self._source, seen.next_header)
            self._source.seek(position)
        seen.next_header += header.num_bytes + header.compressed
        self._num_bytes += header.uncompressed
        self._num_values += header.num_values if seen.is_list else 0
        if self._num_bytes > MAX_BATCH_BYTES:
            raise pa.ArrowInvalid(
                f"pages of {self._num_bytes:,} bytes, decompressed, for few rows; at most "
                f"{MAX_BATCH_BYTES:,} at a time are read"
            )
        if self._num_values > MAX_BATCH_VALUES:
            raise pa.ArrowInvalid(
                f"lists of {self._num_values:,} values for few rows; at most {MAX_BATCH_VALUES:,} "
                "at a time are read"
            )


def read_header(source: Any, position: int) -> PageHeader:
    """Read one header of a file.

    Args:
        source: the file; pyarrow.NativeFile.
        position: where the header begins, bytes.

    Raises:
        pa.ArrowInvalid: there is none.
    """
    num_bytes = _FIRST_READ_BYTES
    while num_bytes <= MAX_HEADER_BYTES:
        content = bytes(source.read_at(num_bytes, position)) if position >= 0 else b""
        header = _parsed(content)
        if header is not None:
            return header
        if len(content) < num_bytes:
            break
        num_bytes *= 16
    raise pa.ArrowInvalid(f"no page header at byte {position:,}")


def _parsed(content: bytes) -> PageHeader | None:
    """The header that some bytes begin with; None where they end before it does.

    Raises:
        pa.ArrowInvalid: they begin with something else.
    """
    cursor = Compact(content)
    try:
        found = cursor.struct()
    except IndexError:
        return None
    kinds = [found[kind] for kind in _KINDS if isinstance(found.get(kind), dict)]
    sizes = (found.get(_COMPRESSED_SIZE), found.get(_UNCOMPRESSED_SIZE), *(k.get(1) for k in kinds))
    if len(sizes) != 3 or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise pa.ArrowInvalid("a page header that lacks its sizes")
    return PageHeader(cursor.position, *sizes)
