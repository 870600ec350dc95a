"""One output folder, by names relative to it: whole-file writes, exclusive creation, publishing.

`Store` works on any pyarrow filesystem. `LocalStore` adds what only a local disk can promise: fsync
and creation that fails when the name is taken. `ObjectStore` has that too, and no rename. None of
them knows of plans, chunks or Parquet.

Every public operation is tried again while its error may pass (`retries`), and is made of few
primitive ones: `_put`, `_create`, `_move`, `_remove` and `_append` change storage, the others look.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs

from eevp_batch.storage.location import Location, locate
from eevp_batch.storage.lock import HeldLock, LockTimes, heartbeat_lock, is_beating
from eevp_batch.storage.retries import Patience, keep_trying

_BLOCK_BYTES = 1 << 20
_Answer = TypeVar("_Answer")


class Store:
    """A folder in any pyarrow filesystem.

    Names are relative, with `/`. A name is never made from row data. On HDFS a rename to a free
    name is atomic, so a file is there whole or not at all; where a file is replaced its name is
    missing for a moment, which a resume does not mind: nothing that it goes by is ever replaced.

    Every method raises StorageError when storage kept failing or is full, and OSError for what does
    not pass.

    Attributes:
        text: the path or URI that was opened, for messages and for opening it again.
        creates_atomically: whether of two that create one name at once exactly one succeeds. Where
            not (HDFS through pyarrow), only the lock keeps a second coordinator away.
        appends_cheaply: whether `append_line` adds to a file, instead of making a new one.
        reads_at_once: how many small files to read at a time when many are to be read.
        patience: how long a failing operation is tried again.
        lock_times: how often the holder of a lock is heard of.
    """

    creates_atomically = False
    appends_cheaply = False
    reads_at_once = 8

    def __init__(self, filesystem: Any, root: str, text: str | None = None) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.text = text if text is not None else root
        self.patience = Patience()
        self.lock_times = LockTimes()
        self._before_again: Callable[[], None] = lambda: None
        self._folders: set[str] = set()
        self._next_line: dict[str, int] = {}

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Store:
        """Open a local path or a URI; nothing is created yet.

        Raises:
            UsageError: the URI cannot be opened or carries a secret.
        """
        return Store.at(locate(path))

    @staticmethod
    def at(location: Location) -> Store:
        """Open a located folder, with the promises that its kind of storage allows."""
        from eevp_batch.storage.local_store import LocalStore
        from eevp_batch.storage.object_store import OBJECT_STORES, ObjectStore

        kind: type[Store] = Store
        if isinstance(location.filesystem, pa.fs.LocalFileSystem):
            kind = LocalStore
        elif location.filesystem.type_name in OBJECT_STORES:
            kind = ObjectStore
        return kind(location.filesystem, location.path, location.text)

    def with_patience(self, patience: Patience) -> Store:
        """The same folder, with another patience."""
        other = copy.copy(self)
        other.patience = patience
        return other

    def guarded(self, check: Callable[[], None]) -> Store:
        """The same folder; before an operation is tried again, `check` may raise that it must not.

        Storage may be back only after another process has taken the folder over.
        """
        other = copy.copy(self)
        other._before_again = check
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    # --- reading -------------------------------------------------------------------------------

    def path(self, rel: str) -> str:
        """The path inside the filesystem."""
        return f"{self.root}/{rel}" if rel else self.root

    def read(self, rel: str) -> bytes:
        """The whole content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self._try(f"reading {rel}", partial(self._get, rel))

    def open_input(self, rel: str) -> Any:
        """A random-access pyarrow file; reads from it are tried again by its client alone."""
        opened = partial(self.filesystem.open_input_file, self.path(rel))
        return self._try(f"opening {rel}", opened)

    def exists(self, rel: str) -> bool:
        """Whether a file or folder of that name is there."""
        return bool(self._info(rel).type != pa.fs.FileType.NotFound)

    def size(self, rel: str) -> int:
        """Size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        info = self._info(rel)
        if info.type != pa.fs.FileType.File:
            raise FileNotFoundError(f"{self.text}: no file {rel}")
        return int(info.size)

    def sha256(self, rel: str) -> str:
        """Hex digest of the content, read in blocks."""
        return self._try(f"reading {rel}", partial(self._digest, rel))

    def names(self, rel_dir: str) -> Iterator[str]:
        """Names of the files directly in a folder, in any order; none when it is absent."""
        selector = pa.fs.FileSelector(self.path(rel_dir), allow_not_found=True)
        listed = partial(self.filesystem.get_file_info, selector)
        for info in self._try(f"listing {rel_dir}", listed):
            if info.type == pa.fs.FileType.File:
                yield info.base_name

    def read_lines(self, rel: str) -> Iterator[str]:
        """Lines written by `append_line`, oldest first; none when there are none."""
        folder = f"{rel}.d"
        for name in self.list(folder):
            yield from self.read(f"{folder}/{name}").decode("utf-8", "replace").split("\n")

    # --- writing -------------------------------------------------------------------------------

    def write(self, rel: str, data: bytes) -> None:
        """Write or replace a whole file; a reader sees the old content or the new one."""
        self._try(f"writing {rel}", partial(self._write, rel, data))

    def create_exclusive(self, rel: str, data: bytes) -> None:
        """Write a file whose name must be free.

        Where an answer was lost and the operation was tried again, a file with the same content is
        the one that was created.

        Raises:
            FileExistsError: the name is taken.
        """

        def is_done() -> bool | None:
            return True if self.read(rel) == data else None

        def create() -> bool:
            self._create(rel, data)
            return True

        self._try(f"creating {rel}", create, is_done)

    def publish(self, src: str, dst: str) -> None:
        """Rename `src` to `dst`, replacing what stands there.

        Raises:
            FileNotFoundError: there is no `src`.
        """
        self._try(f"renaming {src} to {dst}", partial(self._move, src, dst))

    def delete(self, rel: str, missing_ok: bool = False) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: it is not there and `missing_ok` is false.
        """
        if self.exists(rel):
            # Whoever deletes it meanwhile, or in a try whose answer was lost, does as well.
            with contextlib.suppress(FileNotFoundError):
                self._try(f"deleting {rel}", partial(self._remove, rel))
        elif not missing_ok:
            raise FileNotFoundError(f"{self.text}: no file {rel}")

    def append_line(self, rel: str, text: str) -> None:
        """Append one line, or several at once; an answer that is lost may double them."""
        self._try(f"appending to {rel}", partial(self._append, rel, text.rstrip("\n").encode()))

    def settle(self, rel_dir: str) -> None:
        """Make what stands in a folder durable, whoever wrote it; here it is so already.

        A writer that was killed may not have come to that, and a power cut could still take back
        what its successor has seen and gone on from.
        """

    def temporary_name(self, rel: str) -> str:
        """A free name beside `rel` that every reader of Parquet folders skips."""
        folder, slash, name = rel.rpartition("/")
        return f"{folder}{slash}.{name}.{uuid.uuid4().hex}.tmp"

    # --- locking -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, rel: str) -> Iterator[HeldLock]:
        """Hold `rel` against other processes, on any machine, until the block ends; see `lock`.

        Raises:
            UsageError: another process holds it.
        """
        with heartbeat_lock(self, rel) as held:
            yield held

    def is_locked(self, rel: str) -> bool | None:
        """Whether a process holds `rel`; None where nobody ever did."""
        return is_beating(self, rel)

    # --- primitive operations: one each, without another try -----------------------------------

    def _get(self, rel: str) -> bytes:
        with self.filesystem.open_input_file(self.path(rel)) as stream:
            content, size = bytes(stream.read()), stream.size()
        if len(content) != size:
            raise ConnectionError(f"{rel}: connection closed after {len(content)} of {size} bytes")
        return content

    def _digest(self, rel: str) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_file(self.path(rel)) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _put(self, rel: str, data: bytes) -> None:
        """Write a file; without a temporary name it may be seen, or left by a crash, in part."""
        self._ensure_folder(rel)
        with self.filesystem.open_output_stream(self.path(rel)) as stream:
            stream.write(data)

    def _create(self, rel: str, data: bytes) -> None:
        """Look, then write: enough only under the lock, see `creates_atomically`."""
        if self._exists(rel):
            raise FileExistsError(f"{self.text}: {rel} exists already")
        self._write(rel, data)

    def _move(self, src: str, dst: str) -> None:
        self._ensure_folder(dst)
        self.filesystem.move(self.path(src), self.path(dst))

    def _remove(self, rel: str) -> None:
        self.filesystem.delete_file(self.path(rel))

    def _append(self, rel: str, line: bytes) -> None:
        """Most storage cannot append: each line is a small file in `rel`.d/.

        Files are numbered after those that are there: clocks differ, and go back.
        """
        folder = f"{rel}.d"
        if rel not in self._next_line:
            last = max(self.names(folder), default="")
            self._next_line[rel] = int(last.partition("-")[0]) + 1 if last else 0
        name = f"{self._next_line[rel]:020d}-{uuid.uuid4().hex[:8]}"
        self._next_line[rel] += 1
        self._write(f"{folder}/{name}", line)

    def _create_folder(self, folder: str) -> None:
        self.filesystem.create_dir(folder, recursive=True)

    # --- what they are made of -----------------------------------------------------------------

    def _write(self, rel: str, data: bytes) -> None:
        with self._beside(rel, data) as temporary:
            self._move(temporary, rel)

    @contextlib.contextmanager
    def _beside(self, rel: str, data: bytes) -> Iterator[str]:
        """A temporary file for the block to rename; gone where that fails: the disk may be full."""
        temporary = self.temporary_name(rel)
        try:
            self._put(temporary, data)
            yield temporary
        except OSError:
            with contextlib.suppress(OSError):
                self._remove(temporary)
            raise

    def _exists(self, rel: str) -> bool:
        info = self.filesystem.get_file_info(self.path(rel))
        return bool(info.type != pa.fs.FileType.NotFound)

    def _info(self, rel: str) -> Any:
        looked_up = partial(self.filesystem.get_file_info, self.path(rel))
        return self._try(f"looking up {rel}", looked_up)

    def _ensure_folder(self, rel: str) -> None:
        folder = self.path(rel).rpartition("/")[0]
        if folder not in self._folders:
            self._create_folder(folder)
            self._folders.add(folder)

    def _try(
        self,
        what: str,
        operation: Callable[[], _Answer],
        is_done: Callable[[], _Answer | None] = lambda: None,
    ) -> _Answer:
        place = f"{self.text}: {what}"
        return keep_trying(operation, place, self.patience, is_done, self._before_again)

    # Last, because inside a class body its name hides the built-in.
    def list(self, rel_dir: str) -> list[str]:
        """Sorted names of the files directly in a folder; empty when it is absent."""
        return sorted(self.names(rel_dir))


def is_temporary(name: str) -> bool:
    """Whether `name` was made by `Store.temporary_name`."""
    return name.startswith(".") and name.endswith(".tmp")
