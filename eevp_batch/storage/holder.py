"""Who holds a lock: what its file says, and what can be known of a holder on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass

_FILE_BYTES = 1023


@dataclass(frozen=True, slots=True)
class Holder:
    """What a holder's file says.

    Attributes:
        owner: drawn anew by every holder.
        kernel: the running system and process-id namespace that `pid` belongs to.
        flock_scope: the running system and mounted filesystem on which the holder also has a file
            lock; None where it has none.
        beats: heartbeats so far.
        unix_s: its clock at the last one, for people and for `status`.
        released: whether it has let go.
    """

    owner: str
    host: str
    pid: int
    kernel: str
    flock_scope: str | None
    beats: int
    unix_s: float
    released: bool

    @property
    def text(self) -> str:
        return f"process {self.pid} on {self.host}"

    def may_live(self, flock_scope: str | None) -> bool:
        """Whether it has neither let go nor died where that can be seen from here.

        Args:
            flock_scope: where the asker has the file lock.
        """
        if self.released:
            return False
        if flock_scope is not None and self.flock_scope == flock_scope:
            return False  # it would still have the file lock
        return self.kernel != _kernel() or _is_running_here(self.pid)

    def to_bytes(self) -> bytes:
        """JSON, always as long: a client that asks for the size first never gets it cut off."""
        return json.dumps(asdict(self)).encode().ljust(_FILE_BYTES) + b"\n"

    @classmethod
    def here(cls, flock_scope: str | None) -> Holder:
        """This process, as a new holder."""
        return cls(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            kernel=_kernel(),
            flock_scope=flock_scope,
            beats=0,
            unix_s=time.time(),
            released=False,
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Holder | None:
        """The inverse of `to_bytes`; None for anything else."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None


def running_system() -> str:
    """Names the system that runs here until it is started anew."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def _kernel() -> str:
    """Names the running system and the namespace in which a process id means something."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{running_system()} {namespace}"


def _is_running_here(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
