"""The real `LocalStore` on a machine that may die around every operation on its disk."""

from __future__ import annotations

import builtins
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.fs

from eevp_batch.storage.local_store import LocalStore
from eevp_batch.storage.store import Store
from tests.faults.disk import Disk
from tests.faults.labels import label
from tests.faults.machine import Machine


class WatchedDisk:
    """One output folder: what is done to it goes to the machine and to the disk."""

    def __init__(self, machine: Machine, root: str) -> None:
        self.machine, self.disk = machine, Disk(root)
        self._prefix = root + "/"

    def store(self) -> Store:
        """The folder, as a process opens it."""
        return LocalStore(WatchedFiles(self), self.disk.root)

    def plain(self) -> Store:
        """The folder, as an onlooker opens it."""
        return Store.open(self.disk.root)

    def lose_power(self, chance: random.Random) -> None:
        """The power goes and comes back."""
        self.disk.lose(chance)

    def covers(self, path: str) -> bool:
        """Whether a path lies in the folder."""
        return f"{path}/".startswith(self._prefix)

    def name(self, path: str) -> str:
        """What the path is called in the names of points."""
        if not self.covers(path):
            return "folder above"
        return label(path.removeprefix(self._prefix) if path != self.disk.root else "")

    @contextmanager
    def interposed(self) -> Iterator[None]:
        """Lead the system calls of the package's storage through here."""
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("eevp_batch.storage.") and hasattr(module, "os"):
                    stack.enter_context(patch.object(module, "os", WatchedCalls(self)))
                    stack.enter_context(patch.object(module, "open", self.open, create=True))
            yield

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        """The built-in `open`; only appending may change anything."""
        self.machine.check_alive()
        if "a" not in mode or not self.covers(path):
            return builtins.open(path, mode, **options)
        with self.machine.operation(f"create {self.name(path)}"):
            builtins.open(path, "a").close()
            self.disk.created(path)
        return WatchedFile(self, path, builtins.open(path, mode, buffering=0, **options))


class WatchedFile:
    """A file that is written: each write may be cut short in the middle."""

    def __init__(self, watch: WatchedDisk, path: str, file: Any) -> None:
        self._watch, self._file = watch, file
        self._name = watch.name(path)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Write the first half, then the second."""
        point, half = self._watch.machine.point, len(data) // 2
        point(f"before write {self._name}")
        self._file.write(data[:half])
        self._file.flush()
        point(f"in write {self._name}")
        self._file.write(data[half:])
        self._file.flush()
        point(f"after write {self._name}")


class WatchedFiles:
    """The part of pyarrow's local filesystem that changes it."""

    def __init__(self, watch: WatchedDisk) -> None:
        self._watch, self._files = watch, pa.fs.LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        self._watch.machine.check_alive()
        return getattr(self._files, name)

    def open_output_stream(self, path: str) -> WatchedFile:
        """Create or empty a file."""
        watch = self._watch
        with watch.machine.operation(f"create {watch.name(path)}"):
            self._files.open_output_stream(path).close()
            watch.disk.created(path)
        return WatchedFile(watch, path, self._files.open_output_stream(path))

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        WatchedCalls(self._watch).unlink(path)


class WatchedCalls:
    """The module `os`, as the package's storage sees it."""

    def __init__(self, watch: WatchedDisk) -> None:
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """Open a file; with O_CREAT a name may be new."""
        self._watch.machine.check_alive()
        if not (flags & os.O_CREAT and self._watch.covers(path)):
            return os.open(path, flags, mode)
        with self._watch.machine.operation(f"create {self._watch.name(path)}"):
            os.close(os.open(path, flags, mode))
            self._watch.disk.created(path)
        return os.open(path, flags, mode)

    def fsync(self, descriptor: int) -> None:
        """Sync a file or folder, as far as `Disk` is concerned."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        with self._watch.machine.operation(f"fsync {self._watch.name(path)}"):
            self._watch.disk.synced(path)

    def mkdir(self, path: str) -> None:
        """Create a folder."""
        with self._watch.machine.operation(f"mkdir {self._watch.name(path)}"):
            os.mkdir(path)
            self._watch.disk.made(path)

    def link(self, src: str, dst: str) -> None:
        """Give a file a second name."""
        with self._watch.machine.operation(f"link {self._watch.name(dst)}"):
            os.link(src, dst)
            self._watch.disk.linked(src, dst)

    def replace(self, src: str, dst: str) -> None:
        """Rename a file, over what stands there."""
        with self._watch.machine.operation(f"rename to {self._watch.name(dst)}"):
            replaced = _content(dst)
            os.replace(src, dst)
            self._watch.disk.moved(src, dst, replaced)

    def unlink(self, path: str) -> None:
        """Take a name away."""
        with self._watch.machine.operation(f"unlink {self._watch.name(path)}"):
            content = _content(path) or b""
            os.unlink(path)
            self._watch.disk.removed(path, content)


def _content(path: str) -> bytes | None:
    try:
        with builtins.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
