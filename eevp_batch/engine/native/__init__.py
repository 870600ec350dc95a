"""The CPU kernels of `kernels.c`: built by the machine's C compiler at first use, kept in a cache.

Knows pointers and numbers, nothing of models. Without a compiler `kernels` is None, the reason is
logged once, and layers run as transformers wrote them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = "-O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -shared -fPIC"
MACROS = {torch.bfloat16: ["-DEEVP_BF16"], torch.float32: []}
BUILD_TIMEOUT_S = 120

_log = logging.getLogger(__name__)
_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Attention(ctypes.Structure):
    """What the attention of one layer needs; field for field the structure in `kernels.c`."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cosine", "sine", "q_norm", "k_norm")),
        *((name, _POINTER) for name in ("slots", "positions", "seats", "page_table", "blocks")),
        *((name, _POINTER) for name in ("keys", "values", "queries", "out")),
        *((name, _COUNT) for name in ("num_rows", "num_blocks", "num_heads", "num_kv_heads")),
        *((name, _COUNT) for name in ("head_size", "table_width", "window")),
        *((name, _FLOAT) for name in ("eps", "scaling")),
    )


_SIGNATURES = {
    "eevp_norm": [_POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _COUNT, _COUNT],
    "eevp_add": [_POINTER, _POINTER, _COUNT],
    "eevp_silu_mul": [_POINTER, _POINTER, _COUNT, _COUNT],
    "eevp_attention": [_POINTER],
    "eevp_summary": [_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER],
    "eevp_top_k": [_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER],
    "eevp_gathered": [_POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT],
}


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for activations of `dtype`, or None where they cannot be had.

    Environment:
        EEVP_NATIVE: `0` leaves them out. CC: the compiler, `cc` by default.
        XDG_CACHE_HOME: where they are kept, `~/.cache` by default.
    """
    if os.environ.get("EEVP_NATIVE") == "0" or dtype not in MACROS:
        return None
    try:
        library = ctypes.CDLL(str(_built(dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "CPU kernels are not available, layers run as transformers wrote them (slower): %s",
            error,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _built(dtype: torch.dtype) -> Path:
    """Path of the library, built if this source, compiler and processor have not met before."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler: {compiler[0]!r} is not on the PATH (CC names another)")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    command = [*compiler, *FLAGS.split(), *MACROS[dtype]]
    key = "\n".join([SOURCE.read_text(), *command, version, _processor()])
    name = hashlib.sha256(key.encode()).hexdigest()[:24] + ".so"
    path = _cache_folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / name
            done = subprocess.run(
                [*command, "-o", str(made), str(SOURCE), "-lm"],
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_S,
            )
            if done.returncode:
                raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
            made.replace(path)  # two processes may build at once; either result is whole
    return path


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "eevp-batch"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
