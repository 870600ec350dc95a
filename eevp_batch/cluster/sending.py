"""What of this machine a job needs on a cluster: what is sent along, what every node sees anyway.

Knows the job file and local files, nothing of Ray. A path that is neither on storage, nor in a
folder that all nodes see, nor small enough to be sent, is refused with its place in the job file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eevp_batch.errors import InputError, SpecError
from eevp_batch.spec_file import SpecSource
from eevp_batch.storage.listing import list_inputs
from eevp_batch.storage.location import is_inside, is_uri, locate
from eevp_batch.storage.sent_inputs import sent_name, sent_path

MAX_SENT_BYTES = 64 << 20
"""Most bytes that go along with a job; Ray's job server takes 100 MiB at once."""
SENT_INPUTS = "inputs"
"""Folder of the parcel that holds input files."""

_LOCAL_URI = "file://"


@dataclass
class Parcel:
    """What goes along with a job.

    Attributes:
        job_file: the job file, sent as it is, so that errors name its lines.
        files: by name in the parcel, the local file.
        overrides: `a.b=c` for every path that means something else on the cluster.
    """

    job_file: Path
    files: dict[str, Path] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @property
    def has_inputs(self) -> bool:
        return any(name.startswith(f"{SENT_INPUTS}/") for name in self.files)

    def write(self, folder: Path) -> None:
        """Copy everything into a folder."""
        shutil.copyfile(self.job_file, folder / self.job_file.name)
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def pack(source: SpecSource, job_file: str, seen: Sequence[str], where: str) -> Parcel:
    """Decide for each path of a job how the cluster comes by it.

    Args:
        source: the job, its paths resolved.
        job_file: path of its file.
        seen: folders that all nodes see under the same path.
        where: names the cluster in errors.

    Raises:
        SpecError: file, line, field: a path that the cluster cannot see.
        InputError: an input that is to be sent is not there.
    """
    return _Packer(source, Path(job_file), seen, where).pack()


def unseen_here(source: SpecSource, seen: Sequence[str]) -> list[str]:
    """The local paths of a job that only the cluster can check: seen by all nodes, not from here.

    Args:
        source: the job, its paths resolved.
        seen: folders that all nodes see under the same path.
    """
    spec = source.spec
    found = [*_listed(spec.input.path), spec.model.path, spec.exit.heads, spec.exit.calibration]
    roots = [_before_pattern(path) for path in found if path is not None and _is_seen(path, seen)]
    return [path for path in dict.fromkeys(roots) if not os.path.exists(path)]


class _Packer:
    def __init__(self, source: SpecSource, job_file: Path, seen: Sequence[str], where: str) -> None:
        self._source, self._spec = source, source.spec
        self._seen, self._where = [os.path.abspath(path) for path in seen], where
        self._parcel = Parcel(job_file)
        self._left_bytes = MAX_SENT_BYTES

    def pack(self) -> Parcel:
        self._inputs()
        self._model()
        for name in ("heads", "calibration"):
            self._fitted(name)
        path = _plain(self._spec.output.path)
        if not self._is_visible(path):
            allowed = f"a URI, or {self._seen_words()}"
            raise self._unseen("output.path", path, allowed)
        self._override("output.path", path)
        return self._parcel

    def _inputs(self) -> None:
        entries: list[str] = []
        given = self._spec.input.path
        for number, entry in enumerate(_listed(given)):
            path = _plain(entry)
            name = "input.path" if isinstance(given, str) else f"input.path[{number}]"
            entries += [path] if self._is_visible(path) else self._sent_inputs(name, path)
        self._override("input.path", entries)

    def _sent_inputs(self, field_name: str, entry: str) -> list[str]:
        """Where the files of an entry will be."""
        try:
            paths = [Path(path) for path in list_inputs(entry)]
        except InputError as error:
            raise self._unseen(field_name, entry, self._sent_words()) from error
        self._weigh(field_name, entry, paths)
        found = []
        for path in paths:
            name = sent_name(path)
            self._parcel.files[f"{SENT_INPUTS}/{name}"] = path
            found.append(sent_path(_plain(self._spec.output.path), name))
        return found

    def _model(self) -> None:
        path = self._spec.model.path
        if not os.path.isabs(path):
            return  # a hub id
        if not self._is_visible(path):
            allowed = f"a hub id, or a folder that is the same on every node: {self._seen_words()}"
            raise self._unseen("model.path", path, allowed)
        self._override("model.path", path)

    def _fitted(self, name: str) -> None:
        """What `fit` or `calibrate` wrote: small as a rule."""
        path = getattr(self._spec.exit, name)
        if path is None:
            return
        if self._is_visible(path):
            self._override(f"exit.{name}", path)
            return
        root = Path(path)
        files = sorted(file for file in root.iterdir() if file.is_file()) if root.is_dir() else []
        files = [root] if root.is_file() else files
        if not files:
            raise self._unseen(f"exit.{name}", path, self._sent_words())
        self._weigh(f"exit.{name}", path, files)
        for file in files:
            self._parcel.files[f"{name}/{file.name}"] = file
        self._override(f"exit.{name}", f"{name}/{root.name}" if root.is_file() else name)

    def _weigh(self, field_name: str, path: str, files: Sequence[Path]) -> None:
        size = sum(file.stat().st_size for file in files)
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise self._unseen(field_name, f"{path}, {size / 2**20:,.0f} MiB", self._sent_words())

    def _is_visible(self, path: str) -> bool:
        return is_uri(path) or _is_seen(path, self._seen)

    def _override(self, field_name: str, value: str | Sequence[str]) -> None:
        text = json.dumps(value, ensure_ascii=False)
        self._parcel.overrides.append(f"{field_name}={text}")

    def _unseen(self, field_name: str, found: str, allowed: str) -> SpecError:
        origin = self._source.origin(field_name)
        found = f"{found}, a path of this machine that {self._where} does not see"
        return SpecError(origin.file, origin.line, field_name, found, allowed)

    def _seen_words(self) -> str:
        if not self._seen:
            return "a path in a folder that cluster.shared_paths names"
        return f"a path in a folder of cluster.shared_paths, {' or '.join(self._seen)}"

    def _sent_words(self) -> str:
        limit = f"at most {MAX_SENT_BYTES >> 20} MiB in all, which are sent along"
        return f"a URI, {self._seen_words()}, or files of {limit}"


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _plain(path: str) -> str:
    """A local path for a `file://` URI."""
    return locate(path).path if path.startswith(_LOCAL_URI) else path


def _is_seen(path: str, seen: Sequence[str]) -> bool:
    return not is_uri(path) and any(is_inside(path, folder) for folder in seen)


def _before_pattern(path: str) -> str:
    """The deepest folder without a wildcard; a name that exists is no pattern."""
    if os.path.exists(path):
        return path
    return os.path.join("/", *_until_wild(path))


def _until_wild(path: str) -> Iterator[str]:
    for part in path.split("/"):
        if any(letter in part for letter in "*?["):
            return
        yield part
