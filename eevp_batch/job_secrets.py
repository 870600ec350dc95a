"""No password in a job file: it is copied into the output folder, for others to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from eevp_batch.errors import SpecError
from eevp_batch.uri_secrets import ALLOWED_CREDENTIALS, has_secret
from eevp_batch.yaml_lines import Document, Loc, dotted

# What is said to a model may speak of anything.
_SECTIONS_OF_TEXT = {("prompt",), ("sampling",)}
_NAMES_OF_VARIABLES = ("cluster", "env")


def refuse_secrets(document: Document) -> None:
    """Refuse URIs with passwords or keys, and values of variables, before anything repeats them.

    Args:
        document: a job file with its overrides.

    Raises:
        SpecError: says where, and not what.
    """
    _refuse(document, (), document.value)


def _refuse(document: Document, loc: Loc, value: Any) -> None:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, str):
        if has_secret(value):
            found = "a URI with a password or an access key"
            _raise(document, loc, found, ALLOWED_CREDENTIALS)
        if loc[:-1] == _NAMES_OF_VARIABLES and "=" in value:
            _raise(document, loc, "a variable with its value", "its name alone: `submit` has it")
    for key, item in items:
        if (*loc, key) not in _SECTIONS_OF_TEXT:
            _refuse(document, (*loc, key), item)


def _raise(document: Document, loc: Loc, found: str, allowed: str) -> NoReturn:
    origin = document.origin(loc)
    raise SpecError(origin.file, origin.line, dotted(loc), found, allowed)
