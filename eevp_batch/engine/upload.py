"""Python numbers on their way to the device, without waiting for it.

A plain `torch.tensor(numbers, device="cuda")` copies from pageable memory and waits until the
device has done everything before it. From pinned memory the copy only takes its place in the
stream; torch's caching host allocator keeps the pinned block until the copy has been made, and
gives another one to the next step meanwhile. What stays on a CPU is made there as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; itself where that is the host."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these numbers, or of these rows of numbers, on the device."""
    return moved(torch.tensor(numbers, dtype=dtype), device)


def columns_to_device(columns: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Each column as an int64 tensor; on a GPU all of them in one copy, as parts of one tensor."""
    if device.type != "cuda":
        return [to_device(column, torch.int64, device) for column in columns]
    together = to_device([*chain(*columns)], torch.int64, device)
    return list(torch.split(together, [len(column) for column in columns]))
