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


def to_device(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these numbers, or of these rows of numbers, on the device."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def columns_to_device(
    columns: Sequence[Sequence[int]], device: torch.device
) -> list[torch.Tensor]:
    """Each column as an int64 tensor; on a GPU all of them in one copy, as parts of one tensor."""
    if device.type != "cuda":
        return [torch.tensor(column, dtype=torch.int64, device=device) for column in columns]
    together = to_device([*chain(*columns)], torch.int64, device)
    return list(together.split([len(column) for column in columns]))
