"""Strategies that damage what was whole: texts, bytes, and JSON documents."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -1e308, float("nan"),
    float("inf"), "", "x", "../../etc/passwd", "a\nb\0", "\ud800", "ü" * 5000, "1", "null",
    [], [[]], [1, "a", None], {}, {"a": {"b": []}}, "x" * 70_000,
]  # fmt: skip
_PLACES = st.integers(0, 10**6)

TextEdit = tuple[int, int, str]


def edited_texts(bases: Sequence[str], snippets: Sequence[str]) -> st.SearchStrategy[str]:
    """A text of which pieces were replaced by snippets, by characters, or by nothing."""
    inserted = st.sampled_from(snippets) | st.text(max_size=3) | st.just("")
    edit = st.tuples(_PLACES, st.integers(0, 30) | st.just(0), inserted)
    return st.builds(_edit_text, st.sampled_from(bases), st.lists(edit, min_size=1, max_size=6))


def _edit_text(text: str, edits: list[TextEdit]) -> str:
    for place, length, inserted in edits:
        start = place % (len(text) + 1)
        text = text[:start] + inserted + text[start + length :]
    return text


def edited_bytes(bases: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of which some were changed, most of them near the end, or which were cut."""
    edit = st.tuples(st.booleans(), _PLACES, st.binary(min_size=1, max_size=4))
    cut = st.none() | _PLACES
    return st.builds(
        _edit_bytes, st.sampled_from(bases), st.lists(edit, min_size=1, max_size=4), cut
    )


def _edit_bytes(content: bytes, edits: list[tuple[bool, int, bytes]], cut: int | None) -> bytes:
    changed = bytearray(content)
    for is_near_end, place, inserted in edits:
        span = min(len(changed), 600) if is_near_end else len(changed)
        start = len(changed) - 1 - place % span
        changed[start : start + len(inserted)] = inserted
    # Most files are whole: what is cut short is seen at once.
    return bytes(changed if cut is None or cut % 8 else changed[: cut % len(changed)])


def edited_json(bases: Sequence[str]) -> st.SearchStrategy[str]:
    """A JSON document in which values were replaced, removed or added, or a damaged text of it."""
    edit = st.tuples(
        _PLACES,
        st.sampled_from(["replace", "replace", "remove", "add"]),
        st.sampled_from(HOSTILE_VALUES) | st.integers(-3, 30) | st.text(max_size=5),
    )
    structural = st.builds(
        _edit_json, st.sampled_from(bases), st.lists(edit, min_size=1, max_size=3)
    )
    return structural | edited_texts(
        bases, ["{", "}", "[" * 3000, "null", '"', ",", "1e999", "NaN"]
    )


def _edit_json(text: str, edits: list[tuple[int, str, Any]]) -> str:
    document = json.loads(text)
    for place, action, value in edits:
        slots = list(_slots(document))
        if not slots:
            break
        parent, key = slots[place % len(slots)]
        if action == "replace":
            parent[key] = copy.deepcopy(value)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}{value}"[:50]] = copy.deepcopy(value)
        else:
            parent.append(copy.deepcopy(parent[key]))
    return json.dumps(document)


def _slots(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document: the list or mapping that it is in, and its key there."""
    items: Any = ()
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    for key, value in items:
        yield document, key
        yield from _slots(value)
