"""Notices that Ray's head is gone, and ends the job for it before Ray ends the process.

Replicas that are up go on without the head for a while, but nothing can be started or ended any
more, and some of Ray's calls wait for it without end. After a minute Ray aborts every process that
was connected to it, the driver's with a text of its own. So a thread asks the head's port; when it
has not answered `LOST_AFTER` times in a row, the job ends as one whose cluster is gone. A head that
comes back sooner is never noticed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

import ray

from eevp_batch.errors import ClusterError

LOOK_EVERY_S = 2.0
LOST_AFTER = 10
"""Looks in a row; a paused process counts none."""
GRACE_S = 20.0
"""For the driver to end by itself once the head is lost: Ray's calls may hang."""
_CONNECT_S = 2.0


class HeadWatch:
    """Watches one head.

    Args:
        address: its host and port.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        host, _, port = address.rpartition(":")
        self._place = (host.strip("[]"), int(port))
        self._lost, self._ended = threading.Event(), threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether it has not answered for too long."""
        return self._lost.is_set()

    def check(self) -> None:
        """Make sure that it is there.

        Raises:
            ClusterError: it is lost.
        """
        if self.is_lost:
            raise ClusterError(self._text)

    def watch(self) -> None:
        """Look until `end`; ends the process if it does not end itself once the head is lost."""
        missed = 0
        while not self._ended.wait(LOOK_EVERY_S):
            missed = 0 if self._answers() else missed + 1
            if missed >= LOST_AFTER:
                self._lost.set()
                break
        if self.is_lost and not self._ended.wait(GRACE_S):
            print(f"Error: {self._text}", file=sys.stderr, flush=True)
            os._exit(ClusterError.exit_code)

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    @property
    def _text(self) -> str:
        return (
            f"the head of the Ray cluster at {self._address} has been gone for "
            f"{LOST_AFTER * LOOK_EVERY_S:g} s; what is committed stays, and the same command goes "
            "on from there once there is a cluster"
        )

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._place, _CONNECT_S).close()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def watched_head() -> Iterator[HeadWatch]:
    """Watch the head of the Ray that this process is connected to while the block runs."""
    watch = HeadWatch(ray.get_runtime_context().gcs_address)
    threading.Thread(target=watch.watch, name="eevp-head-watch", daemon=True).start()
    try:
        yield watch
    finally:
        watch.end()


@contextlib.contextmanager
def watched_ray() -> Iterator[HeadWatch]:
    """The same, and leave that Ray at the end; without its head, that may take for ever."""
    with watched_head() as watch:
        try:
            yield watch
        finally:
            ray.shutdown()
