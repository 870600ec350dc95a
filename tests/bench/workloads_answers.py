"""When a generated text is the right answer, by what a workload asks for."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def starts_with(text: str, expected: str) -> bool:
    """A form that is filled in: the text begins with it; its closing brace is a stop string."""
    return text.strip().startswith(expected.rstrip("}"))


def last_number(text: str, expected: str) -> bool:
    """A sum that is worked out in words: the last number is the result."""
    found = _NUMBER.findall(text)
    return bool(found) and _value(found[-1]) == _value(expected)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


ANSWERS: dict[str, Callable[[str, str], bool]] = {"start": starts_with, "number": last_number}
