"""Ends the process of a replica whose engine hangs, so that another one can take its place.

A kernel that never returns cannot be interrupted: only the end of its process frees the replica's
chunks and its device. Time is counted in looks, not read off a clock, so that a process that is
paused, or a laptop that slept, is not taken for one that hangs.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass

STEP_SHARE = 3
"""A step may take this part of `run.no_progress_timeout_s`: a replica that hangs is replaced, and
its successor has time to show progress, before the job is given up."""
EXIT_CODE = 70
_STDERR = 2
_LOOKS = 20  # for each limit
_FRAMES = 4  # of two lines each: what a death's reason has room for


@dataclass(frozen=True, slots=True, eq=False)
class Doing:
    """One thing that a thread does.

    Attributes:
        what: in the third person.
        since_s: monotonic time of its beginning.
        thread_id: of the thread.
        is_bounded: whether it hangs if it takes too long.
    """

    what: str
    since_s: float
    thread_id: int
    is_bounded: bool = False


class Pulse:
    """What the engine's thread is doing; that thread writes it, any other may read it."""

    def __init__(self, what: str) -> None:
        self.begin(what)

    def begin(self, what: str, *, is_bounded: bool = False) -> None:
        """From now on the thread does this."""
        self.doing = Doing(what, time.monotonic(), threading.get_ident(), is_bounded)

    def __str__(self) -> str:
        doing = self.doing
        return f"{doing.what}, for {time.monotonic() - doing.since_s:.0f} s"


def watch(name: str, pulse: Pulse, no_progress_timeout_s: float) -> None:
    """Start a thread that ends this process when a bounded thing takes too long.

    Its last words, on stderr, are where the thread stands and why the process ends. A kernel that
    hangs without letting other threads run is ended by a timer of C, at the whole timeout.

    Args:
        name: the replica's.
        pulse: of its engine's thread.
        no_progress_timeout_s: of the job.
    """
    limit_s = no_progress_timeout_s / STEP_SHARE
    arguments = (name, pulse, limit_s, no_progress_timeout_s)
    threading.Thread(target=_watch, args=arguments, name="eevp-watchdog", daemon=True).start()


def _watch(name: str, pulse: Pulse, limit_s: float, whole_s: float) -> None:
    look_s = limit_s / _LOOKS
    seen, stuck_s = pulse.doing, 0.0
    while stuck_s < limit_s:
        faulthandler.dump_traceback_later(whole_s, exit=True, file=_STDERR)
        time.sleep(look_s)
        doing = pulse.doing
        stuck_s = stuck_s + look_s if doing is seen and doing.is_bounded else 0.0
        seen = doing
    frame = sys._current_frames().get(seen.thread_id)
    stack = traceback.format_stack(frame)[-_FRAMES:] if frame else []
    text = (
        f"{''.join(stack)}{name} hangs: it {seen.what} for more than {limit_s:g} s, a third of "
        "run.no_progress_timeout_s; its watchdog ends it\n"
    )
    os.write(_STDERR, text.encode())
    os._exit(EXIT_CODE)
