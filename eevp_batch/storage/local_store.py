"""`Store` on a local disk: what is written is synced, and an exclusive name is taken atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Any

from eevp_batch.errors import UsageError
from eevp_batch.storage.store import Store

# What filesystems without hard links, directory sync or locks answer.
_UNSUPPORTED = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LOCK_WAIT_S = 2.0


class LocalStore(Store):
    """A folder on a local disk (or a mounted one)."""

    def names(self, rel_dir: str) -> Iterator[str]:
        """See `Store.names`; entries are streamed."""
        try:
            entries = os.scandir(self.path(rel_dir))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if entry.is_file():
                    yield entry.name

    def create_exclusive(self, rel: str, data: bytes) -> None:
        """See `Store.create_exclusive`; a name is taken whole or not at all, even by a crash.

        The content is written and synced under a temporary name, then linked: `link` fails when
            the name is
        taken, and a crash before it leaves no half-written file under the name.
        """
        temporary = self.temporary_name(rel)
        self._put(temporary, data)
        try:
            os.link(self.path(temporary), self.path(rel))
        except FileExistsError:
            raise FileExistsError(f"{self.text}: {rel} exists already") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            super().create_exclusive(rel, data)
        finally:
            os.unlink(self.path(temporary))
        _sync(os.path.dirname(self.path(rel)))

    @contextlib.contextmanager
    def open_output(self, rel: str) -> Iterator[Any]:
        """See `Store.open_output`; content and name are synced when the block ends."""
        with super().open_output(rel) as stream:
            yield stream
        _sync(self.path(rel))
        _sync(os.path.dirname(self.path(rel)))

    def publish(self, src: str, dst: str) -> None:
        """See `Store.publish`; the rename is atomic and synced."""
        self.ensure_folder(dst)
        os.replace(self.path(src), self.path(dst))
        _sync(os.path.dirname(self.path(dst)))

    def delete(self, rel: str, missing_ok: bool = False) -> None:
        """See `Store.delete`; synced, for a power cut must not bring back what was taken back."""
        if self.exists(rel) or not missing_ok:
            super().delete(rel, missing_ok)
            _sync(os.path.dirname(self.path(rel)))

    def settle(self, rel_dir: str) -> None:
        """See `Store.settle`."""
        path = self.path(rel_dir)
        if os.path.isdir(path):
            with contextlib.suppress(PermissionError):  # a parent that we may only pass through
                _sync(os.path.dirname(path))
            _sync(path)

    def read_lines(self, rel: str) -> Iterator[str]:
        """See `Store.read_lines`."""
        if not self.exists(rel):
            return
        with open(self.path(rel), encoding="utf-8", errors="replace") as file:
            for line in file:
                yield line.rstrip("\n")

    def append_line(self, rel: str, text: str) -> None:
        """Append one line and flush it; a line that a crash cut short is ended first."""
        self.ensure_folder(rel)
        line = text.rstrip("\n").encode() + b"\n"
        with open(self.path(rel), "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    @contextlib.contextmanager
    def lock(self, rel: str) -> Iterator[None]:
        """Hold `rel` against other processes until the block, or this process, ends.

        Raises:
            UsageError: another process holds it.
        """
        self.ensure_folder(rel)
        descriptor = os.open(self.path(rel), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise UsageError(f"{self.text}: another process is running a job here")
                time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def is_locked(self, rel: str) -> bool | None:
        """Whether a process holds `rel`; None where nobody ever did."""
        try:
            descriptor = os.open(self.path(rel), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def _create_folder(self, folder: str) -> None:
        """Create the folder, and sync each folder that got a new entry on the way."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            _sync(os.path.dirname(path))


def _try_lock(descriptor: int, kind: int) -> bool:
    """Take the lock if it is free; a filesystem without locks always grants it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.ENOLCK}:
            raise
    return True


def _sync(path: str) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot sync a folder; their server orders the entries itself.
        if error.errno not in _UNSUPPORTED or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
