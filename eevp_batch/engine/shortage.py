"""Out of memory: how it shows, and what can be given back at once."""

from __future__ import annotations

import torch

# What torch says where it does not raise its own OutOfMemoryError: the allocator of the CPU, the
# driver, and a library that found no room for its workspace.
_SAYINGS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or the device ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(saying in text for saying in _SAYINGS)


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
