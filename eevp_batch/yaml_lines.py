"""YAML to plain values that remember where they stood.

The subset is what a job file needs: mappings with string keys, lists, strings, numbers, booleans,
null, resolved by YAML 1.2's core schema (so `on` is a string and `1e-3` a number). Aliases, tags,
repeated keys, deep nesting and large files are refused, each with its line. Knows nothing of jobs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from eevp_batch.errors import SpecError

Loc = tuple[str | int, ...]
MAX_DEPTH = 20
MAX_VALUES = 20_000
"""Most keys and values of a document; as many take about a second."""

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: a file and its 1-based line, or an option and None."""

    file: str
    line: int | None


@dataclass
class Document:
    """A value and the origin of every part of it.

    Attributes:
        value: mappings, lists and scalars.
        origins: by path of keys and indices; a part without one has its parent's.
    """

    value: Any
    origins: dict[Loc, Origin] = field(default_factory=dict)

    def origin(self, loc: Loc) -> Origin:
        """Origin of a part, or of the nearest part around it that has one."""
        while loc and loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]


def dotted(loc: Loc) -> str:
    """A path as people write it, such as `input.path[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "document"


def read_yaml(text: str, file: str, first_line: int | None = 1, at: Loc = ()) -> Document:
    """Parse one YAML document.

    Args:
        text: the document.
        file: what errors name as its source.
        first_line: line number of its first line; None for text that has no lines.
        at: path that the document's value will have; origins are relative to the root above it.

    Raises:
        SpecError: it is not YAML, or uses a part of YAML that is refused.
    """
    return _Reader(file, first_line, at).read(text)


class _Refused(Exception):
    def __init__(self, node: Any, found: str, allowed: str) -> None:
        super().__init__(found)
        self.line, self.found, self.allowed = node.start_mark.line, found, allowed


class _Loader(yaml.SafeLoader):
    """Composes nodes; scalars are resolved by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    depth = num_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(event, f"the alias *{event.anchor}", "the value itself")
        if self.depth > MAX_DEPTH:
            raise _Refused(event, f"more than {MAX_DEPTH} levels", "fewer levels")
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _Refused(event, f"more than {MAX_VALUES:,} keys and values", "fewer")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def add_core_resolvers(kind: Any) -> None:
    """Make a loader or dumper class tell scalars apart as YAML 1.2's core schema does."""
    resolvers = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
    for name, pattern in resolvers.items():
        kind.add_implicit_resolver(_TAG + name, pattern, None)


add_core_resolvers(_Loader)


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    value = int(text[2:], bases[text[:2]]) if text[:2] in bases else int(text)
    if value.bit_length() > 64:
        raise ValueError("an integer of more than 64 bits")
    return value


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + "str": (re.compile(r"[^\ud800-\udfff]*\Z"), str),
    _TAG + "null": (_NULL, lambda text: None),
    _TAG + "bool": (_BOOL, lambda text: text.lower() == "true"),
    _TAG + "int": (_INT, _integer),
    _TAG + "float": (_FLOAT, _float),
}


class _Reader:
    """Turns the nodes of one document into values and origins."""

    def __init__(self, file: str, first_line: int | None, at: Loc) -> None:
        self._file, self._first_line, self._at = file, first_line, at
        self._origins: dict[Loc, Origin] = {}

    def read(self, text: str) -> Document:
        try:
            node = self._compose(text)
        except _Refused as refusal:
            raise self._error(self._at, refusal.line, refusal.found, refusal.allowed) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._error(
                self._at,
                mark.line if mark else 0,
                (error.problem or "something that is not YAML").removeprefix("found "),
                "one YAML document, indented with spaces",
            ) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, int(error.position))
            found = f"the character U+{error.character:04X}"
            raise self._error(self._at, line, found, "printable characters") from None
        self._origins[self._at] = self._origin(0)
        value = None if node is None else self._value(node, self._at)
        return Document(value, self._origins)

    @staticmethod
    def _compose(text: str) -> Any:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()

    def _value(self, node: Any, loc: Loc) -> Any:
        self._origins.setdefault(loc, self._origin(node.start_mark.line))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._value(item, (*loc, i)) for i, item in enumerate(node.value)]
        pattern, convert = _SCALARS.get(node.tag, (None, str))
        if pattern is None or not isinstance(node, yaml.ScalarNode):
            tag = node.tag.replace(_TAG, "!!")
            raise self._error(loc, node.start_mark.line, f"the tag {tag}", "a value without a tag")
        if not pattern.match(node.value):
            allowed = f"a value that is {node.tag.removeprefix(_TAG)}"
            raise self._error(loc, node.start_mark.line, repr(node.value), allowed)
        try:
            return convert(node.value)
        except ValueError as error:
            raise self._error(loc, node.start_mark.line, str(error), "a shorter number") from None

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            key: Hashable = key_node.value
            is_text = isinstance(key, str) and _SCALARS[_TAG + "str"][0].match(key)
            if key_node.tag != _TAG + "str" or not isinstance(key, str) or not is_text:
                found = f"the key {key}" if isinstance(key, str) else "a list or mapping as key"
                raise self._error(loc, line, found, "keys that are strings")
            here = (*loc, key)
            if key in out:
                first = self._origins[here].line
                found = "the key a second time" + (f", first on line {first}" if first else "")
                raise self._error(here, line, found, "each key once")
            self._origins[here] = self._origin(line)
            out[key] = self._value(value_node, here)
        return out

    def _origin(self, line: int) -> Origin:
        return Origin(self._file, None if self._first_line is None else self._first_line + line)

    def _error(self, loc: Loc, line: int, found: str, allowed: str) -> SpecError:
        return SpecError(self._file, self._origin(line).line, dotted(loc), found, allowed)
