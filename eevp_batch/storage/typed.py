"""Values read from JSON are of the types that their dataclass says, or are refused by name.

A job of a million chunks has as many records and lines of its plan to check: what a type asks for
is worked out once, and where a value stands is only spelt out when it is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
_Check = Callable[[Any], None]

_MAX_INTEGER = 2**63 - 1


class _Refused(Exception):
    """A value that is of another type.

    Args:
        value: what was found.
        allowed: in words.

    Attributes:
        place: where it is, from the outermost value on.
    """

    def __init__(self, value: Any, allowed: str) -> None:
        super().__init__(value, allowed)
        self.value, self.allowed, self.place = value, allowed, ""

    def within(self, place: str) -> _Refused:
        """The same, one level further out."""
        self.place = place + self.place
        return self


def typed(value: _T) -> _T:
    """A dataclass whose fields, and theirs, have been checked.

    Args:
        value: a dataclass made of what `json.loads` gave.

    Raises:
        TypeError: names the first field of another type, or an integer that no column holds.
    """
    check_type(value, type(value), "")
    return value


def check_type(value: Any, hint: Any, name: str) -> None:
    """Check one value.

    Args:
        value: what was read.
        hint: its type: a plain one, a list, tuple, mapping or union of such, a dataclass.
        name: names it in the error.

    Raises:
        TypeError: it is of another type.
    """
    try:
        _check_of(hint)(value)
    except _Refused as error:
        name = (name + error.place).lstrip(".") or "document"
        found = repr(error.value)[:80]
        raise TypeError(f"{name}: found {found}; allowed: {error.allowed}") from None


@cache
def _check_of(hint: Any) -> _Check:
    """What refuses values that are not of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: None
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is Literal:
        return _plain(lambda value: value in args, f"one of {', '.join(map(repr, args))}")
    if is_dataclass(hint):
        return _object(hint)
    if hint is float:
        return _plain(lambda value: type(value) in (int, float), "a number")
    if hint is int:
        return _plain(_is_integer, "an integer of at most 64 bits")
    if hint is str:
        return _text
    kind = origin or hint
    is_one = _plain(lambda value: isinstance(value, kind), _word(kind))
    items = _items(kind, args)

    def check(value: Any) -> None:
        is_one(value)
        items(value)

    return check if args else is_one


def _text(value: Any) -> None:
    if not isinstance(value, str):
        raise _Refused(value, _word(str))
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, which no file or column can hold
        raise _Refused(value, "text that UTF-8 can hold") from None


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX_INTEGER


def _plain(holds: Callable[[Any], bool], allowed: str) -> _Check:
    def check(value: Any) -> None:
        if not holds(value):
            raise _Refused(value, allowed)

    return check


def _union(args: tuple[Any, ...]) -> _Check:
    # A value is told of by the last kind, unless that is None: `str | None` allows a string.
    kinds = [_check_of(kind) for kind in args if kind is not type(None)]
    allows_none = len(kinds) < len(args)

    def check(value: Any) -> None:
        if value is None and allows_none:
            return
        for kind in kinds[:-1]:
            try:
                return kind(value)
            except _Refused:
                continue
        kinds[-1](value)

    return check


def _object(kind: Any) -> _Check:
    hints = get_type_hints(kind)
    checks = [(field.name, _check_of(hints[field.name])) for field in fields(kind)]
    is_one = _plain(lambda value: isinstance(value, kind), f"an object of {_word(kind)}")

    def check(value: Any) -> None:
        is_one(value)
        for name, holds in checks:
            try:
                holds(getattr(value, name))
            except _Refused as error:
                raise error.within(f".{name}") from None

    return check


def _items(kind: Any, args: tuple[Any, ...]) -> _Check:
    """What refuses the items of a mapping, tuple or list."""
    if not args:
        return lambda value: None
    checks = [_check_of(each) for each in args if each is not Ellipsis]

    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            of_key, of_value = checks if len(checks) == 2 else (checks[0], _check_of(int))
            for key, item in value.items():
                _item(of_key, key, key)
                _item(of_value, key, item)
        elif isinstance(value, tuple) and args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise _Refused(value, f"{len(args)} items")
            for number, item in enumerate(value):
                _item(checks[number], number, item)
        else:
            for number, item in enumerate(value):
                _item(checks[0], number, item)

    return check


def _item(check: _Check, key: Any, item: Any) -> None:
    try:
        check(item)
    except _Refused as error:
        raise error.within(f"[{key!r}]") from None


def _word(kind: Any) -> str:
    return {str: "a string", bool: "true or false", dict: "an object", list: "a list"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )
