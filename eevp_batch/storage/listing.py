"""Which files `input.path` names. Nothing that it may mean is left out without a word."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.fs

from eevp_batch.errors import InputError
from eevp_batch.storage import layout
from eevp_batch.storage.inputs import ALLOWED
from eevp_batch.storage.location import Location, is_inside, is_uri, join, locate, split_uri

_FILE, _FOLDER = pyarrow.fs.FileType.File, pyarrow.fs.FileType.Directory
_OTHER = pyarrow.fs.FileType.Unknown
_PARTS = (layout.data_part(0), layout.errors_part(0))


def list_inputs(paths: str | Sequence[str]) -> list[str]:
    """The Parquet files that `input.path` names, each once.

    A name that exists is taken literally, whatever characters it has; only then is it a pattern.
    Folders are searched to the bottom for `*.parquet`, names that start with `.` or `_` left out;
    so is a folder called `*.parquet`, as Spark makes them, that a pattern matches. Files of one
    entry are sorted by path; entries keep their order.

    Raises:
        InputError: an entry names no file, or a link that leads nowhere.
    """
    found = dict.fromkeys(path for entry in _entries(paths) for path in _expand(entry))
    if not found:
        raise InputError(str(paths), "input.path", "an empty list", ALLOWED)
    return list(found)


def refuse_own_output(paths: str | Sequence[str], output: str) -> None:
    """Refuse to read from where the job writes: a resume would find its own parts there.

    Args:
        paths: what `input.path` says.
        output: folder or URI of the output.

    Raises:
        InputError: names the entry.
    """
    target = locate(output)
    for entry in _entries(paths):
        location = locate(entry)
        kind = location.filesystem.get_file_info(location.path).type
        if kind == _FILE or not location.filesystem.equals(target.filesystem):
            continue
        pattern = None
        if kind != _FOLDER:
            location, pattern = _split_glob(entry)
        place = os.path.relpath(_resolved(target), _resolved(location))
        parts = (f"{place}/{part}".removeprefix("./") for part in _PARTS)
        if not place.startswith("..") and any(_takes(name, pattern) for name in parts):
            found = f"a place in which the output, {target.text}, would be taken for input"
            raise InputError(entry, "input.path", found, "an output.path somewhere else")


def _entries(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _resolved(location: Location) -> str:
    return os.path.realpath(location.path) if _is_local(location) else location.path


def _is_local(location: Location) -> bool:
    return isinstance(location.filesystem, pyarrow.fs.LocalFileSystem)


def _expand(entry: str) -> list[str]:
    location = locate(entry)
    kind = location.filesystem.get_file_info(location.path).type
    if kind == _FILE:
        return [location.text]
    pattern = None
    if kind != _FOLDER:
        location, pattern = _split_glob(entry)
    found = [name for name in _files_below(location, pattern) if _takes(name, pattern)]
    if not found:
        missing = "a pattern that matches no file" if pattern else "no such file or folder"
        if pattern is None:
            missing = "a folder without *.parquet files"
        raise InputError(entry, "input.path", missing, ALLOWED)
    return [join(location.text, name) for name in sorted(found)]


def _split_glob(entry: str) -> tuple[Location, list[str]]:
    """Split into the deepest folder without a wildcard and the pattern's parts below it."""
    if is_uri(entry):
        base, path = split_uri(entry)
    else:
        base, path = "", locate(entry).path
    parts = path.split("/")
    wild = [i for i, part in enumerate(parts) if any(c in part for c in "*?[")]
    first = wild[0] if wild else len(parts)
    folder = "/".join(parts[:first]) or "/"
    return locate(join(base, folder.lstrip("/")) if base else folder), parts[first:]


def _files_below(location: Location, pattern: list[str] | None) -> Iterator[str]:
    """Paths, relative to a folder, of the files in it that may be meant; no pattern: all.

    Raises:
        InputError: what is meant is a link that leads nowhere: its rows would be missing.
    """
    is_deep = pattern is None or len(pattern) > 1 or "**" in pattern
    for name, kind in _names_below(location, is_deep):
        if kind == _FILE:
            yield name
        elif kind == _FOLDER:
            if not is_deep and _takes(f"{name}/{layout.data_part(0)}", pattern):
                inside = locate(join(location.text, name))
                yield from (f"{name}/{below}" for below in _files_below(inside, None))
        elif _takes(name, pattern):
            found = "a link that leads nowhere, or no file"
            raise InputError(join(location.text, name), "input.path", found, ALLOWED)


def _names_below(location: Location, is_deep: bool) -> Iterator[tuple[str, Any]]:
    """What is in a folder, links followed: path relative to it, and type."""
    if _is_local(location):
        yield from _names_on_disk(location.path, is_deep)
        return
    selector = pyarrow.fs.FileSelector(location.path, recursive=is_deep, allow_not_found=True)
    start = len(location.path.rstrip("/")) + 1
    for info in location.filesystem.get_file_info(selector):
        yield info.path[start:], info.type


def _names_on_disk(path: str, is_deep: bool) -> Iterator[tuple[str, Any]]:
    """The same of a local folder: pyarrow would leave out links that lead nowhere."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            found = f"a folder that cannot be read: {error.strerror}"
            raise InputError(str(error.filename), "input.path", found, ALLOWED) from error

    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        place, holding = os.path.relpath(folder, path), os.path.realpath(folder)
        for name in folders:
            inside = os.path.join(folder, name)
            if os.path.islink(inside) and is_inside(holding, os.path.realpath(inside)):
                found = "a link to a folder that holds it"
                raise InputError(inside, "input.path", found, "links that lead elsewhere")
            yield os.path.normpath(os.path.join(place, name)), _FOLDER
        for name in files:
            kind = _FILE if os.path.isfile(os.path.join(folder, name)) else _OTHER
            yield os.path.normpath(os.path.join(place, name)), kind
        if not is_deep:
            break


def _takes(name: str, pattern: list[str] | None) -> bool:
    """Whether a file is meant, by its path relative to the folder that is searched."""
    parts = name.split("/")
    if pattern is None:
        return _is_parquet(name) and not any(part[0] in "._" for part in parts)
    folders = (at for at in range(1, len(parts)) if _is_parquet(parts[at - 1]))
    return _matches(parts, pattern) or any(
        _matches(parts[:at], pattern) and _takes("/".join(parts[at:]), None) for at in folders
    )


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Match path parts as a shell does: `**` is any number of folders, `*` spares hidden names."""
    if not pattern or not parts:
        return pattern == parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (
            not parts[0].startswith(".") and _matches(parts[1:], pattern)
        )
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return (
        not hidden
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )
