"""One output folder, by names relative to it: whole-file writes, exclusive creation, publishing.

`Store` works on any pyarrow filesystem; `LocalStore` adds what only a local disk can promise:
fsync, creation that fails when the name is taken, a lock. It knows nothing of plans, chunks or
Parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs

from eevp_batch.storage.location import Location, locate

# A PUT to these becomes visible whole or not at all, so a temporary name would only cost a copy.
_WHOLE_PUT = ("s3", "gcs", "abfs", "az")
_BLOCK_BYTES = 1 << 20


class Store:
    """A folder in any pyarrow filesystem.

    Names are relative, with `/`. A name is never made from row data.

    Attributes:
        text: the path or URI that was opened, for messages and for opening it again.
    """

    def __init__(self, filesystem: Any, root: str, text: str | None = None) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.text = text if text is not None else root
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
        """Open a located folder, with the promises of a local disk where it is one."""
        from eevp_batch.storage.local_store import LocalStore

        kind = LocalStore if isinstance(location.filesystem, pa.fs.LocalFileSystem) else Store
        return kind(location.filesystem, location.path, location.text)

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
        with self.open_input(rel) as stream:
            return bytes(stream.read())

    def open_input(self, rel: str) -> Any:
        """A random-access pyarrow file."""
        return self.filesystem.open_input_file(self.path(rel))

    def exists(self, rel: str) -> bool:
        """Whether a file or folder of that name is there."""
        info = self.filesystem.get_file_info(self.path(rel))
        return bool(info.type != pa.fs.FileType.NotFound)

    def size(self, rel: str) -> int:
        """Size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        info = self.filesystem.get_file_info(self.path(rel))
        if info.type != pa.fs.FileType.File:
            raise FileNotFoundError(f"{self.text}: no file {rel}")
        return int(info.size)

    def sha256(self, rel: str) -> str:
        """Hex digest of the content, read in blocks."""
        digest = hashlib.sha256()
        with self.open_input(rel) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def names(self, rel_dir: str) -> Iterator[str]:
        """Names of the files directly in a folder, in any order; none when it is absent."""
        selector = pa.fs.FileSelector(self.path(rel_dir), allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.type == pa.fs.FileType.File:
                yield info.base_name

    def read_lines(self, rel: str) -> Iterator[str]:
        """Lines written by `append_line`, oldest first; none when there are none."""
        folder = f"{rel}.d"
        for name in self.list(folder):
            yield self.read(f"{folder}/{name}").decode("utf-8", "replace")

    # --- writing -------------------------------------------------------------------------------

    def write(self, rel: str, data: bytes) -> None:
        """Write or replace a whole file; a reader sees the old content or the new one."""
        if self._puts_whole():
            self._put(rel, data)
            return
        temporary = self.temporary_name(rel)
        self._put(temporary, data)
        self.publish(temporary, rel)

    def create_exclusive(self, rel: str, data: bytes) -> None:
        """Write a file whose name must be free.

        Object stores reached through pyarrow cannot test and create in one request. There the
        name is looked up first, which is enough for the one coordinator that may create.

        Raises:
            FileExistsError: the name is taken.
        """
        if self.exists(rel):
            raise FileExistsError(f"{self.text}: {rel} exists already")
        self.write(rel, data)

    @contextlib.contextmanager
    def open_output(self, rel: str) -> Iterator[Any]:
        """A pyarrow output stream; the file is durable once the block ends."""
        self.ensure_folder(rel)
        with self.filesystem.open_output_stream(self.path(rel)) as stream:
            yield stream

    def publish(self, src: str, dst: str) -> None:
        """Rename `src` to `dst`, replacing what stands there."""
        self.ensure_folder(dst)
        self.filesystem.move(self.path(src), self.path(dst))

    def delete(self, rel: str, missing_ok: bool = False) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: it is not there and `missing_ok` is false.
        """
        if not self.exists(rel):
            if missing_ok:
                return
            raise FileNotFoundError(f"{self.text}: no file {rel}")
        self.filesystem.delete_file(self.path(rel))

    def append_line(self, rel: str, text: str) -> None:
        """Append one line; this store cannot append, so the line is a small file in `rel`.d/.

        Files are numbered after those that are there: clocks differ, and go back.
        """
        folder = f"{rel}.d"
        if rel not in self._next_line:
            last = max(self.names(folder), default="")
            self._next_line[rel] = int(last.partition("-")[0]) + 1 if last else 0
        name = f"{self._next_line[rel]:020d}-{uuid.uuid4().hex[:8]}"
        self._next_line[rel] += 1
        self._put_line(f"{folder}/{name}", text)

    def settle(self, rel_dir: str) -> None:
        """Make what stands in a folder durable, whoever wrote it; here it is so already.

        A writer that was killed may not have come to that, and a power cut could still take back
        what its successor has seen and gone on from.
        """

    @contextlib.contextmanager
    def lock(self, rel: str) -> Iterator[None]:
        """Hold `rel` against other processes; object stores have no locks, so nothing is held."""
        yield

    def is_locked(self, rel: str) -> bool | None:
        """Whether a process holds `rel`; None where that cannot be known."""
        return None

    def ensure_folder(self, rel: str) -> None:
        """Create the folder that `rel` lies in."""
        folder = self.path(rel).rpartition("/")[0]
        if folder not in self._folders:
            self._create_folder(folder)
            self._folders.add(folder)

    def temporary_name(self, rel: str) -> str:
        """A free name beside `rel` that every reader of Parquet folders skips."""
        folder, slash, name = rel.rpartition("/")
        return f"{folder}{slash}.{name}.{uuid.uuid4().hex}.tmp"

    def _create_folder(self, folder: str) -> None:
        self.filesystem.create_dir(folder, recursive=True)

    def _put(self, rel: str, data: bytes) -> None:
        with self.open_output(rel) as stream:
            stream.write(data)

    def _put_line(self, rel: str, text: str) -> None:
        self.write(rel, text.rstrip("\n").encode())

    def _puts_whole(self) -> bool:
        filesystem = self.filesystem
        while isinstance(filesystem, pa.fs.SubTreeFileSystem):
            filesystem = filesystem.base_fs
        return any(kind in filesystem.type_name for kind in _WHOLE_PUT)

    # Last, because inside a class body its name hides the built-in.
    def list(self, rel_dir: str) -> list[str]:
        """Sorted names of the files directly in a folder; empty when it is absent."""
        return sorted(self.names(rel_dir))


def is_temporary(name: str) -> bool:
    """Whether `name` was made by `Store.temporary_name`."""
    return name.startswith(".") and name.endswith(".tmp")
