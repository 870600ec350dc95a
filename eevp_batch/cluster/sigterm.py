"""Lets a replica's process hear SIGTERM, which announces its end, and do something about it.

Ray's own handler ends the process at once, and Python lets nobody but the main thread set another,
which in an actor is Ray's. The handler of `faulthandler` may be set from any thread: instead of
ending the process it writes to a pipe, at whose other end a thread waits.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable

GRACE_S = 20.0
"""A process that is still there so long after SIGTERM ends itself; senders wait 30 s or more."""
EXIT_CODE = 128 + signal.SIGTERM
_TRACEBACK_BYTES = 1 << 16


def on_sigterm(leave: Callable[[], None]) -> None:
    """Call `leave`, in a thread of its own, when this process gets SIGTERM.

    The process may then be ended by others; after `GRACE_S` it ends itself.
    """
    reading, writing = os.pipe()
    faulthandler.register(signal.SIGTERM, file=writing, all_threads=False, chain=False)
    arguments = (reading, leave)
    threading.Thread(target=_wait, args=arguments, name="eevp-sigterm", daemon=True).start()


def _wait(reading: int, leave: Callable[[], None]) -> None:
    os.read(reading, _TRACEBACK_BYTES)
    leave()
    time.sleep(GRACE_S)
    os._exit(EXIT_CODE)
