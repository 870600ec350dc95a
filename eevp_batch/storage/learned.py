"""Exits that a job has learned: a folder in its output, and the record whose existence decides.

As with chunks, a replica writes files under names that nobody reads, the coordinator puts them in
their place and then creates the record. Before the record there is nothing to rely on; after it the
job's later chunks have exits, or are known to have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eevp_batch.errors import JobFailedError
from eevp_batch.storage import layout
from eevp_batch.storage.store import Store
from eevp_batch.storage.typed import typed

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Learned:
    """What became of the learning of a job.

    Attributes:
        reason: why the job has no exits; None where it has some.
        files: hex sha256 of each file in the folder, by name; none where there are no exits.
        figures: layers, thresholds, rows, seconds and what else is worth telling; JSON types.
    """

    reason: str | None
    files: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def has_exits(self) -> bool:
        return self.reason is None

    @property
    def text(self) -> str:
        """One sentence for a person."""
        if self.reason is not None:
            return f"no exits were learned, the job goes on at full depth: {self.reason}"
        layers = ", ".join(map(str, self.figures.get("layers", [])))
        return (
            f"exits learned after layer {layers} from {self.figures.get('rows')} rows: at most "
            f"{self.figures.get('delta', 0.0):.2%} of a row's tokens differ from full depth, with "
            f"{1 - self.figures.get('epsilon', 0.0):.0%} confidence; predicted "
            f"{self.figures.get('speed', 1.0):.2f} times the speed"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


def write_attempt_files(store: Store, files: Mapping[str, bytes], token: str) -> dict[str, str]:
    """The replica's side: write the folder's files under names of this attempt alone.

    Returns:
        Hex sha256 by name.
    """
    for name, content in files.items():
        store.write(layout.attempt_learned(token, name), content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def publish_learned(store: Store, learned: Learned, token: str) -> None:
    """The coordinator's side: put the files in their place and create the record.

    Raises:
        JobFailedError: the attempt's files are gone.
        FileExistsError: there is a record already.
    """
    for name in learned.files:
        attempt = layout.attempt_learned(token, name)
        if not store.exists(attempt):
            raise JobFailedError(f"{store.text}: attempt file {attempt} is gone")
        store.publish(attempt, layout.learned_file(name))
    text = json.dumps(learned.to_json(), indent=1) + "\n"
    store.create_exclusive(layout.LEARNED, text.encode())


def read_learned(store: Store) -> Learned | None:
    """What a job has learned; None before it has, and where its files are not what they were.

    Raises:
        JobFailedError: the record is damaged.
    """
    try:
        text = store.read(layout.LEARNED)
    except FileNotFoundError:
        return None
    try:
        learned = typed(Learned(**json.loads(text)))
        _refuse_paths(learned.files)
    except (ValueError, TypeError, RecursionError) as error:
        raise JobFailedError(f"{layout.LEARNED} is damaged: {error}") from error
    for name, sha256 in learned.files.items():
        rel = layout.learned_file(name)
        if not store.exists(rel) or store.sha256(rel) != sha256:
            return None
    return learned


def _refuse_paths(names: Iterable[str]) -> None:
    """The files are copied to a folder on each replica's machine, and stay in it.

    Raises:
        ValueError: names one that would not.
    """
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"files: found {name!r}; allowed: names of files")


def clean_learned(store: Store) -> None:
    """Remove what a crash left without a record, and a record whose files are not whole."""
    if read_learned(store) is not None:
        return
    store.delete(layout.LEARNED, missing_ok=True)
    for name in store.list(layout.LEARNED_DIR):
        store.delete(f"{layout.LEARNED_DIR}/{name}", missing_ok=True)


def fetch_learned(store: Store, learned: Learned, folder: Path) -> None:
    """Copy the folder to a local one.

    Raises:
        JobFailedError: a file is not the recorded one.
    """
    for name, sha256 in learned.files.items():
        content = store.read(layout.learned_file(name))
        if hashlib.sha256(content).hexdigest() != sha256:
            raise JobFailedError(f"{store.text}: {layout.learned_file(name)} was altered")
        (folder / name).write_bytes(content)
