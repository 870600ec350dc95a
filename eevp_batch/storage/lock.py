"""A lock for one output folder that holds between machines, and where files cannot be locked.

Holders are numbered: `LOCK.d/000007.json` is the seventh, its name is created exclusively, and the
highest number holds. The holder rewrites its file every `beat_s` seconds. Nobody compares the
clocks of two machines: who finds a holder that has not said goodbye *watches* it, by its own
monotonic clock. A file that changes means that another process runs; one that stays the same for
`silent_s` belongs to the dead, and the next number is created. The newcomer then waits `hold_s`
before it touches anything, because that is how long the former holder may go on believing in its
last heartbeat.

The holder, for its part, asks `check` before it changes anything that another coordinator could
change: within `hold_s` of its last heartbeat that is free; later, it sends one first, for as long
as storage needs to come back; and it stops when there is a higher number. An operation that
storage refuses is checked again before each later try. What remains is one request that is under
way for longer than `silent_s + hold_s`, or a process that is stopped for so long between `check`
and the request: then the exclusive commit record still admits only one of the two.

A holder that was killed on this very machine is known to be dead, so nobody waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eevp_batch.errors import JobFailedError, StorageError, UsageError
from eevp_batch.storage.holder import Holder
from eevp_batch.storage.retries import NO_PATIENCE

if TYPE_CHECKING:
    from eevp_batch.storage.store import Store

_log = logging.getLogger(__name__)
_GOODBYE_S = 5.0
_STALE_LISTING_S = 120.0  # NFS may show a folder as it was a minute ago
_NAME = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class LockTimes:
    """How often a holder is heard of; every process that uses a folder must have the same.

    Attributes:
        beat_s: from one heartbeat to the next, seconds.
        hold_s: how long a heartbeat lets its sender act, seconds.
        silent_s: who is not heard of for so long is dead, seconds; more than `hold_s`.
        settle_s: where two can create one name at once, how long to wait before looking who did.
    """

    beat_s: float = 10.0
    hold_s: float = 30.0
    silent_s: float = 60.0
    settle_s: float = 3.0


class HeldLock:
    """A lock while it is held; `check` tells whether it still is.

    Attributes:
        lost_to: who has taken it over; None while nobody has.
    """

    def __init__(self, store: Store, folder: str, number: int, me: Holder, sent_s: float) -> None:
        self._store, self._folder, self._number, self._me = store, folder, number, me
        self._believed_s = sent_s  # when the last heartbeat that arrived was begun
        self.lost_to: str | None = None
        self._sending = threading.Lock()

    def check(self) -> None:
        """Make sure that nobody else holds the folder; see the module.

        Raises:
            JobFailedError: another process has taken it over.
            StorageError: storage kept failing.
        """
        if self.lost_to is None and _awake_s() - self._believed_s > self._store.lock_times.hold_s:
            self.beat(self._store)
        if self.lost_to is not None:
            raise JobFailedError(
                f"{self._store.text}: {self.lost_to} has taken this folder over, because no "
                "heartbeat of this process arrived; what is committed stays"
            )

    def beat(self, store: Store) -> None:
        """Say that this process lives, and look whether another one has taken over.

        Args:
            store: the lock's store, with the patience to use.
        """
        with self._sending:
            sent_s = _awake_s()
            if self.lost_to is None and self._is_mine(store):
                self._me = replace(self._me, beats=self._me.beats + 1, unix_s=time.time())
                store.write(_name(self._folder, self._number), self._me.to_bytes())
                if self._is_mine(store):
                    self._believed_s = sent_s

    def release(self, store: Store) -> None:
        """Say goodbye, so that nobody watches for heartbeats."""
        with self._sending:
            if self.lost_to is None and self._is_mine(store):
                self._me = replace(self._me, released=True)
                store.write(_name(self._folder, self._number), self._me.to_bytes())

    def _is_mine(self, store: Store) -> bool:
        latest = _latest(store, self._folder)
        if latest is None or latest.holder is None or latest.holder.owner != self._me.owner:
            self.lost_to = "another process" if latest is None else latest.text
        return self.lost_to is None


@dataclass(frozen=True, slots=True)
class _Latest:
    """The highest number, and what its file holds."""

    number: int
    content: bytes

    @property
    def holder(self) -> Holder | None:
        return Holder.from_bytes(self.content)

    @property
    def text(self) -> str:
        return "another process" if self.holder is None else self.holder.text

    def may_live(self, flock_scope: str | None) -> bool:
        """See `Holder.may_live`; a file that this version cannot read may be of one that lives."""
        return self.holder is None or self.holder.may_live(flock_scope)


@contextlib.contextmanager
def heartbeat_lock(store: Store, rel: str, flock_scope: str | None = None) -> Iterator[HeldLock]:
    """Hold `rel` while the block runs.

    Args:
        store: where.
        rel: name of the lock.
        flock_scope: see `Holder`.

    Raises:
        UsageError: another process holds it.
    """
    held = _acquire(store, f"{rel}.d", flock_scope)
    impatient, stop = store.with_patience(NO_PATIENCE), threading.Event()

    def beat() -> None:
        while not stop.wait(store.lock_times.beat_s):
            try:
                held.beat(impatient)
            except OSError as error:  # `check` decides what a missing heartbeat means
                _log.warning("%s: no heartbeat: %s", store.text, error)

    thread = threading.Thread(target=beat, name="eevp-heartbeat", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join(_GOODBYE_S)
        # Without a goodbye the next one to come watches for heartbeats first.
        if not thread.is_alive():
            with contextlib.suppress(OSError):
                held.release(impatient)


def is_beating(store: Store, rel: str, flock_scope: str | None = None) -> bool | None:
    """Whether a process holds `rel`; None where nobody ever did.

    Where clocks disagree or the holder may be dead, it is watched for two heartbeats.
    """
    folder = f"{rel}.d"
    latest = _latest(store, folder)
    if latest is None:
        return None
    if not latest.may_live(flock_scope):
        return False
    told_s = 0.0 if latest.holder is None else latest.holder.unix_s
    if abs(time.time() - told_s) < store.lock_times.silent_s:
        return True
    return _watch(store, folder, latest, 2 * store.lock_times.beat_s) != latest


def _acquire(store: Store, folder: str, flock_scope: str | None) -> HeldLock:
    times = store.lock_times
    latest, wait_s = _latest(store, folder), 0.0
    if latest is not None and latest.may_live(flock_scope):
        latest = _watch_out(store, folder, latest)
        wait_s = times.hold_s if latest.may_live(flock_scope) else 0.0
    number = latest.number + 1 if latest is not None else 1
    me = Holder.here(flock_scope)
    held = HeldLock(store, folder, number, me, _awake_s())
    try:
        store.create_exclusive(_name(folder, number), me.to_bytes())
    except FileExistsError:
        raise _is_running(store, "another process") from None
    if not store.creates_atomically:
        wait_s = max(wait_s, times.settle_s)
    if wait_s:
        time.sleep(wait_s)
        held.beat(store)
        if held.lost_to is not None:
            raise _is_running(store, held.lost_to)
    for name in store.names(folder):
        earlier = _number(name)
        if earlier is not None and earlier < number:
            store.delete(f"{folder}/{name}", missing_ok=True)
    return held


def _watch_out(store: Store, folder: str, latest: _Latest) -> _Latest:
    """Watch a holder that may live until it is taken to be dead, or lets go.

    Raises:
        UsageError: it lives.
    """
    silent_s, who = store.lock_times.silent_s, latest.text
    _log.warning("%s: %s has not let go; watching it for %.0f s", store.text, who, silent_s)
    seen = _watch(store, folder, latest, silent_s)
    if seen != latest and (seen is None or seen.may_live(None)):
        raise _is_running(store, who if seen is None else seen.text)
    return seen or latest


def _watch(store: Store, folder: str, latest: _Latest, limit_s: float) -> _Latest | None:
    """Look again and again until something is different, or for so many seconds."""
    until_s = time.monotonic() + limit_s
    while True:
        time.sleep(min(1.0, store.lock_times.beat_s / 4))
        has_ended = time.monotonic() >= until_s  # before the look: the last one comes after it
        seen = _latest(store, folder)
        if has_ended or seen != latest:
            return seen


def _latest(store: Store, folder: str) -> _Latest | None:
    """The holder with the highest number; None before the first one.

    Raises:
        StorageError: the listing names a file that is not there, however often it is asked for.
    """
    until_s = time.monotonic() + _STALE_LISTING_S
    while time.monotonic() < until_s:
        numbers = [number for name in store.names(folder) if (number := _number(name)) is not None]
        if not numbers:
            return None
        with contextlib.suppress(FileNotFoundError):  # whoever holds a higher one has tidied up
            return _Latest(max(numbers), store.read(_name(folder, max(numbers))))
        time.sleep(0.1)
    raise StorageError(f"{store.text}: {folder} lists a file that is not there")


def _is_running(store: Store, who: str) -> UsageError:
    return UsageError(f"{store.text}: another process is running a job here: {who}")


def _name(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _number(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def _awake_s() -> float:
    """A clock that nobody sets and that goes on while the machine sleeps, seconds."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
