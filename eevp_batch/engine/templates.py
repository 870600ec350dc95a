"""Jinja templates that can neither leave their sandbox nor run for ever nor fill the memory.

Jinja's sandbox keeps a template away from Python's internals and bounds `range`. It bounds neither
nested loops nor what one operation makes of its operands; both are bounded here, in the thread that
renders, by CPU time and by sizes, so that a machine that pauses changes no row.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateRuntimeError
from jinja2.compiler import CodeGenerator, Frame
from jinja2.nodes import Concat
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

MAX_CHARS = 16 << 20
"""Most characters of a rendered text, and of every text on the way."""
MAX_CPU_S = 5.0
"""Most seconds of CPU time that one rendering may take."""

_MAX_MADE = 16 * MAX_CHARS  # characters of all texts on the way
_MAX_PRODUCT = 100 << 20  # of the lengths of what an operation may multiply
_MAX_PADDING = 1 << 20
_MAX_INTEGER_BITS = 1 << 14
_EVENTS_PER_LOOK = 128

_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson"}
_MULTIPLYING = {"replace", "join", "translate", "indent", "wordwrap", "xmlattr", "urlize"}
_FORMATTING = {"format", "format_map"}
# A width of many digits, or one that is computed: `{:999999}`, `{:{width}}`, `%*d`.
_WIDE_FORMAT = re.compile(r"\d{6}|\{[^{}]*\{|%[^%a-zA-Z]*\*")


class TemplateLimitError(TemplateRuntimeError):
    """A rendering took too long, or made too much text."""


class BoundedTemplate(Template):
    """Renders within `MAX_CPU_S` and `MAX_CHARS`."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """See `jinja2.Template.render`.

        Raises:
            TemplateLimitError: it would be too much.
        """
        with _watched():
            return super().render(*args, **kwargs)


class _BoundedGenerator(CodeGenerator):
    """Has `a ~ b` joined as a template's output is."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with bounds on time and size; without its autoescape."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    template_class = BoundedTemplate
    code_generator_class = _BoundedGenerator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard_filters()

    def guard_filters(self) -> None:
        """Bound what the filters make of their arguments; again after filters were added."""
        for name in (_PADDING | _MULTIPLYING | _FORMATTING) & self.filters.keys():
            if not hasattr(self.filters[name], "is_bounded"):
                self.filters[name] = _bounded(name, self.filters[name])

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template or a block writes, piece by piece up to the limit."""
        kept: list[str] = []
        num_chars = 0
        for piece in pieces:
            num_chars += len(piece)
            _refuse_long(num_chars)
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute one of the operators that may make much of little."""
        if operator == "+":
            _refuse_long(_length(left) + _length(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; methods of strings are bounded as the filters are."""
        method = getattr(called, "__wrapped__", called)
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            _check_arguments(name, [text, *args, *kwargs.values()])
        return super().call(context, called, *args, **kwargs)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raise in this thread once the block has used up its CPU time or holds too long a text."""
    before = sys.gettrace()
    deadline_s = time.thread_time() + MAX_CPU_S
    num_events = num_made = 0

    def look(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal num_events, num_made
        num_events += 1
        if event == "return" and isinstance(value, str):
            _refuse_long(len(value))
            num_made += len(value)
            if num_made > _MAX_MADE:
                raise TemplateLimitError(f"it makes more than {_MAX_MADE:,} characters in all")
        if num_events % _EVENTS_PER_LOOK == 0 and time.thread_time() > deadline_s:
            raise TemplateLimitError(f"it takes more than {MAX_CPU_S:g} seconds of CPU time")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, [*args, *kwargs.values()])
        return function(*args, **kwargs)

    checked.is_bounded = True  # type: ignore[attr-defined]
    return checked


def _check_arguments(name: str, values: list[Any]) -> None:
    if name in _PADDING and any(isinstance(v, int) and v > _MAX_PADDING for v in values):
        raise TemplateLimitError(f"{name}: more than {_MAX_PADDING:,} characters of padding")
    if name in _FORMATTING:
        for value in values[:1]:
            _check_format(str(value))
    if name in _MULTIPLYING:
        largest = sorted(map(_length, values), reverse=True)
        if len(largest) > 1 and largest[0] * largest[1] > _MAX_PRODUCT:
            raise TemplateLimitError(f"{name}: its arguments are too long")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateLimitError("a format with a width of many digits, or one that is computed")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _refuse_long_integer(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int):
            _refuse_long(_length(sequence) * times)


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int):
        _refuse_long_integer(base.bit_length() * exponent)


def _refuse_long_integer(num_bits: int) -> None:
    if num_bits > _MAX_INTEGER_BITS:
        raise TemplateLimitError(f"an integer of more than {_MAX_INTEGER_BITS:,} bits")


def _length(value: Any) -> int:
    """Characters of a text; of a list or mapping, those of its items, one at least for each."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Iterator):
        return MAX_RANGE  # it cannot be counted without being used up
    if isinstance(value, Mapping):
        return sum(1 + _length(v) for v in value.values() if isinstance(v, str))
    if isinstance(value, list | tuple):
        return sum(1 + len(v) if isinstance(v, str) else 1 for v in value)
    return 0


def _refuse_long(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise TemplateLimitError(f"it makes more than {MAX_CHARS:,} characters")
