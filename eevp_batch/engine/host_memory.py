"""Keeping freed host memory in the process, and letting it go."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_TRIM_BYTES, _TOP_PAD_BYTES = 1 << 30, 64 << 20


def keep_freed_memory() -> bool:
    """Tell glibc to keep what a step frees for the next step.

    A step allocates and frees the same large activations every time. Left alone, glibc gives them
    back to the system and faults every page in again: 7,500 page faults a step in a thread (64
    sequences of a 135M model on a CPU), 12 to 30 ms of about 150. One arena serves all threads,
    because others cannot keep so much.

    Returns:
        Whether there is a glibc that took the settings.
    """
    libc = _glibc()
    if libc is None:
        return False
    settings = {
        _ARENA_MAX: 1,
        _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _TRIM_THRESHOLD: _TRIM_BYTES,
        _TOP_PAD: _TOP_PAD_BYTES,
    }
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())


def let_freed_memory_go() -> None:
    """Give back to the system what is freed; for between two phases, where it would only be kept.

    Reading a model frees copies of its weights as they are laid out, layer by layer.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is one with glibc's settings."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
