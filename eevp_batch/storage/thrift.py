"""Thrift's compact protocol, as far as Parquet's footers and page headers need it.

Reads integers, lists and structs; texts and doubles are skipped. pyarrow parses all of this as
well, but tells of page headers nothing, and of columns only through calls that abort the process
where a footer contradicts itself.

The protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_MAX_DEPTH = 16
_TRUE, _FALSE, _BYTE, _I16, _I64 = 1, 2, 3, 4, 6
_DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 7, 8, 9, 10, 12


class Compact:
    """A cursor over encoded bytes. Past their end it raises IndexError.

    Attributes:
        position: of the next byte.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The next struct: value by number of the field; None for what is skipped.

        Raises:
            pa.ArrowInvalid: it is none.
        """
        if depth > _MAX_DEPTH:
            raise pa.ArrowInvalid("structs in structs without end")
        content = self._content
        fields: dict[int, Any] = {}
        number = 0
        while head := content[self.position]:
            self.position += 1
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        self.position += 1
        return fields

    def length_of_list(self, field: int) -> int:
        """Items of a list that is a field of the next struct; the fields before it are skipped.

        Raises:
            pa.ArrowInvalid: there is none.
        """
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            if number == field and head & 15 == _LIST:
                return self._head_of_list()[0]
            self._value(head & 15, 0)
        raise pa.ArrowInvalid(f"no list in field {field}")

    def _value(self, kind: int, depth: int) -> Any:
        if _I16 <= kind <= _I64:
            return self._integer()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind in (_TRUE, _FALSE):  # they have no bytes of their own
            return None
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind in (_BYTE, _DOUBLE):
            return self._skip(1 if kind == _BYTE else 8)
        raise pa.ArrowInvalid(f"a field of type {kind}, which the format does not have")

    def _list(self, depth: int) -> list[Any]:
        size, kind = self._head_of_list()
        if depth > _MAX_DEPTH:
            raise pa.ArrowInvalid("lists in lists without end")
        if kind in (_TRUE, _FALSE):
            self._skip(size)
            return []
        return [self._value(kind, depth + 1) for _ in range(size)]

    def _head_of_list(self) -> tuple[int, int]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if size > len(self._content):  # each item takes a byte at least
            raise IndexError
        return size, head & 15

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
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise pa.ArrowInvalid("an integer of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
