"""Values read from JSON are of the types that their dataclass says, or are refused by name."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")

_MAX_INTEGER = 2**63 - 1


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
    kind: Any = hint
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin in (Union, types.UnionType):
        _check_union(value, args, name)
    elif origin is Literal:
        _require(value in args, name, value, f"one of {', '.join(map(repr, args))}")
    elif is_dataclass(hint):
        _require(isinstance(value, kind), name, value, f"an object of {_word(hint)}")
        for field_name, field_hint in _hints(kind):
            check_type(getattr(value, field_name), field_hint, f"{name}.{field_name}".lstrip("."))
    elif hint is float:
        _require(type(value) in (int, float), name, value, "a number")
    elif hint is int:
        is_integer = type(value) is int and abs(value) <= _MAX_INTEGER
        _require(is_integer, name, value, "an integer of at most 64 bits")
    else:
        _require(isinstance(value, origin or hint), name, value, _word(origin or hint))
        _check_items(value, args, name)


def _check_union(value: Any, args: tuple[Any, ...], name: str) -> None:
    # A value is told of by the first kind, unless that is None: `str | None` allows a string.
    kinds = [kind for kind in args if kind is not type(None)]
    if value is None and len(kinds) < len(args):
        return
    for number, kind in enumerate(kinds):
        try:
            return check_type(value, kind, name)
        except TypeError:
            if number == len(kinds) - 1:
                raise


def _check_items(value: Any, args: tuple[Any, ...], name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            for each, hint in zip(
                (key, item), args if len(args) == 2 else (*args, int), strict=False
            ):
                check_type(each, hint, f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        _require(args[-1] is Ellipsis or len(args) == len(value), name, value, f"{len(args)} items")
        for number, item in enumerate(value):
            check_type(item, args[0] if args[-1] is Ellipsis else args[number], f"{name}[{number}]")
    elif isinstance(value, list) and args:
        for number, item in enumerate(value):
            check_type(item, args[0], f"{name}[{number}]")


@cache
def _hints(kind: Any) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind)]


def _word(kind: Any) -> str:
    return {str: "a string", bool: "true or false", dict: "an object", list: "a list"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise TypeError(f"{name or 'document'}: found {repr(value)[:80]}; allowed: {allowed}")
