"""What a Parquet file says of its size, seen before anything of that size is made.

A few kilobytes can be a page of 2 GiB, and a footer says nothing of pages that can be relied on.
So the reader is given a file that looks at every page header which passes through it, and a footer
is asked for its number of columns before it is parsed. Knows headers only: what stands in a page is
pyarrow's business.

The format: https://github.com/apache/parquet-format (`PageHeader` and `FileMetaData` in
parquet.thrift), in Thrift's compact protocol.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

MAX_BATCH_BYTES = 512 << 20
"""Most bytes of pages, decompressed, that are begun for one batch of rows."""
MAX_BATCH_VALUES = 16 << 20
"""Most values of lists in pages that are begun for one batch of rows."""
MAX_HEADER_BYTES = 16 << 20
"""Longest page header: it may hold the smallest and the largest value. pyarrow's own limit."""
_FIRST_READ_BYTES = 1 << 10
_MAX_DEPTH = 8
# Numbers of the fields that are read; the headers of the kinds of pages all begin with num_values.
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _KINDS = 2, 3, (5, 7, 8)
_I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 6, 7, 8, 9, 12


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


@dataclass
class ColumnRun:
    """Where the pages of one column of a row group stand, one after another.

    Attributes:
        start, stop: bytes of the file.
        is_list: whether a row may have many values.
        next_header: where the first header stands that was not looked at yet.
    """

    start: int
    stop: int
    is_list: bool
    next_header: int = -1

    def __post_init__(self) -> None:
        self.next_header = self.start


def column_runs(metadata: Any, groups: Iterable[int], leaves: Sequence[int]) -> list[ColumnRun]:
    """The runs of some columns.

    Args:
        metadata: of the file.
        groups: row groups.
        leaves: numbers of the columns, nested ones counted.
    """
    runs = []
    for group in map(metadata.row_group, groups):
        for leaf in leaves:
            column = group.column(leaf)
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            is_list = metadata.schema.column(leaf).max_repetition_level > 0
            runs.append(ColumnRun(start, start + column.total_compressed_size, is_list))
    return runs


class PageGuard:
    """A file, opened to be read, that refuses pages which are too large together.

    Args:
        source: the file; pyarrow.NativeFile.
        runs: the columns that are going to be read; other parts of the file are not looked at.

    Raises:
        pa.ArrowInvalid: columns lie over each other.
    """

    def __init__(self, source: Any, runs: Iterable[ColumnRun]) -> None:
        self._source = source
        self._runs = sorted(runs, key=lambda run: run.start)
        self._starts = [run.start for run in self._runs]
        for run, after in zip(self._runs, self._runs[1:], strict=False):
            if run.stop > after.start:
                raise pa.ArrowInvalid("columns whose pages lie over each other")
        self.begin_batch()

    def begin_batch(self) -> None:
        """Another batch of rows is going to be read."""
        self._num_bytes = self._num_values = 0

    def read(self, num_bytes: int = -1) -> bytes:
        """Read on, having looked at the headers in what was read.

        Raises:
            pa.ArrowInvalid: they announce too much, or cannot be read.
        """
        start = self._source.tell()
        content: bytes = self._source.read(None if num_bytes < 0 else num_bytes)
        stop = start + len(content)
        first = max(0, bisect_right(self._starts, start) - 1)
        for run in self._runs[first : bisect_right(self._starts, stop)]:
            while run.next_header < min(stop, run.stop):
                self._look(run, content[max(0, run.next_header - start) :], run.next_header < start)
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

    def _look(self, run: ColumnRun, content: bytes, is_elsewhere: bool) -> None:
        """Look at a run's next header, which `content` begins with unless it is elsewhere."""
        header = None if is_elsewhere else _parsed(content)
        if header is None:
            position = self._source.tell()
            header = read_header(self._source, run.next_header)
            self._source.seek(position)
        run.next_header += header.num_bytes + header.compressed
        self._num_bytes += header.uncompressed
        self._num_values += header.num_values if run.is_list else 0
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
        content = bytes(source.read_at(num_bytes, position))
        header = _parsed(content)
        if header is not None:
            return header
        if len(content) < num_bytes:
            break
        num_bytes *= 16
    raise pa.ArrowInvalid(f"no page header at byte {position:,}")


def num_columns_said(footer: bytes) -> int:
    """Columns in a footer's schema, nested ones and the groups around them counted.

    Args:
        footer: of the file; not parsed further than to that number.

    Raises:
        pa.ArrowInvalid: it does not begin as a footer does.
    """
    reader = _Thrift(footer)
    try:
        return reader.length_of_field(2)
    except IndexError as error:
        raise pa.ArrowInvalid("a footer that ends before its schema") from error


def _parsed(content: bytes) -> PageHeader | None:
    """The header that some bytes begin with; None where they end before it does.

    Raises:
        pa.ArrowInvalid: they begin with something else.
    """
    reader = _Thrift(content)
    try:
        found = reader.struct()
    except IndexError:
        return None
    kinds = [found[kind] for kind in _KINDS if isinstance(found.get(kind), dict)]
    sizes = (found.get(_COMPRESSED_SIZE), found.get(_UNCOMPRESSED_SIZE), *(k.get(1) for k in kinds))
    if len(sizes) != 3 or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise pa.ArrowInvalid("a page header that lacks its sizes")
    return PageHeader(reader.position, *sizes)


class _Thrift:
    """Reads a struct in Thrift's compact protocol: integers and structs in it, the rest skipped."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise pa.ArrowInvalid("a page header with structs in structs without end")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._integer()
            fields[number] = self._value(kind, depth)
        return fields

    def length_of_field(self, wanted: int) -> int:
        """Items of the list that is a field of the struct; the fields before it are skipped."""
        number = 0
        while (head := self._byte()) != 0:
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._integer()
            if number == wanted and kind == _LIST:
                size = self._byte() >> 4
                return size if size < 15 else self._varint()
            self._value(kind, 0)
        raise pa.ArrowInvalid("a footer without a schema")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false have no bytes of their own
            return None
        if 4 <= kind <= _I64:
            return self._integer()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind == 3 or kind == _DOUBLE:
            return self._skip(1 if kind == 3 else 8)
        if kind == _BINARY:
            return self._skip(self._varint())
        # Lists, sets and maps stand in no header that the format knows.
        raise pa.ArrowInvalid(f"a page header with a field of type {kind}")

    def _byte(self) -> int:
        value = self._content[self.position]
        self.position += 1
        return value

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._content):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise pa.ArrowInvalid("a page header with an integer of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
