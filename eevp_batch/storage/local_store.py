"""`Store` on a local disk: what is written is synced, and an exclusive name is taken atomically.

The same holds on a filesystem that machines share, NFS for one: `link` and `rename` are atomic on
its server.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from eevp_batch.errors import UsageError
from eevp_batch.storage.holder import running_system
from eevp_batch.storage.lock import HeldLock, heartbeat_lock, is_beating
from eevp_batch.storage.store import Store

# What filesystems without hard links, directory sync or locks answer.
_UNSUPPORTED = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LOCK_WAIT_S = 2.0


class LocalStore(Store):
    """A folder on a local disk (or a mounted one, shared by machines or not)."""

    creates_atomically = True
    appends_cheaply = True
    reads_at_once = 1

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

    def publish(self, src: str, dst: str) -> None:
        """See `Store.publish`; the rename is atomic and synced."""
        source = self._try(f"looking up {src}", lambda: os.stat(self.path(src)))

        def is_done() -> bool | None:
            return True if os.path.samestat(source, os.stat(self.path(dst))) else None

        def move() -> bool:
            self._move(src, dst)
            return True

        self._try(f"renaming {src} to {dst}", move, is_done)

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

    @contextlib.contextmanager
    def lock(self, rel: str) -> Iterator[HeldLock]:
        """See `Store.lock`.

        A file lock keeps off the processes of this machine at once, and ends with its process;
        the heartbeats are for other machines, and for filesystems without file locks.
        """
        self._ensure_folder(rel)
        descriptor = os.open(self.path(rel), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while (is_mine := _try_lock(descriptor, fcntl.LOCK_EX)) is False:
                if time.monotonic() > deadline:
                    raise UsageError(f"{self.text}: another process is running a job here")
                time.sleep(0.05)
            with heartbeat_lock(self, rel, _flock_scope(descriptor) if is_mine else None) as held:
                yield held
        finally:
            os.close(descriptor)

    def is_locked(self, rel: str) -> bool | None:
        """See `Store.is_locked`."""
        try:
            descriptor = os.open(self.path(rel), os.O_RDONLY)
        except FileNotFoundError:
            return is_beating(self, rel)
        try:
            is_free = _try_lock(descriptor, fcntl.LOCK_SH)
            if is_free is False:
                return True
            return bool(is_beating(self, rel, _flock_scope(descriptor) if is_free else None))
        finally:
            os.close(descriptor)

    def _put(self, rel: str, data: bytes) -> None:
        """See `Store._put`; content and name are synced."""
        super()._put(rel, data)
        _sync(self.path(rel))
        _sync(os.path.dirname(self.path(rel)))

    def _create(self, rel: str, data: bytes) -> None:
        """Take a name whole or not at all, even by a crash.

        The content is written and synced under a temporary name, then linked: `link` fails when
        the name is taken, and a crash before it leaves no half-written file under the name.
        """
        with self._beside(rel, data) as temporary:
            try:
                os.link(self.path(temporary), self.path(rel))
            except FileExistsError:
                # A server's answer may be lost and its client ask again: then it is our own file.
                if not os.path.samefile(self.path(temporary), self.path(rel)):
                    raise FileExistsError(f"{self.text}: {rel} exists already") from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self.creates_atomically = False
                super()._create(rel, data)
            self._remove(temporary)
        _sync(os.path.dirname(self.path(rel)))

    def _move(self, src: str, dst: str) -> None:
        self._ensure_folder(dst)
        os.replace(self.path(src), self.path(dst))
        _sync(os.path.dirname(self.path(dst)))

    def _remove(self, rel: str) -> None:
        os.unlink(self.path(rel))

    def _append(self, rel: str, line: bytes) -> None:
        """Append and flush; a line that a crash cut short is ended first."""
        self._ensure_folder(rel)
        line += b"\n"
        with open(self.path(rel), "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

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


def _flock_scope(descriptor: int) -> str:
    """Names what a lock on this file reaches: this running system, this mounted filesystem."""
    return f"{running_system()} {os.fstat(descriptor).st_dev}"


def _try_lock(descriptor: int, kind: int) -> bool | None:
    """Take the lock if it is free; None on a filesystem without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.ENOLCK}:
            raise
        return None
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
