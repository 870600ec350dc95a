"""What segments run on: a GPU, the CPU, or some cores of it.

Two `Device`s that are cores of one CPU are two devices in every respect that matters to the engine:
each has its own layers, its own keys and values, and a thread of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from eevp_batch.errors import UsageError

FREE_SHARE = 0.85
"""Of a device's free memory that is used; the rest is for what a step needs."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where some segments are, and how a thread that runs them is set up.

    Attributes:
        at: where tensors are.
        cores: the cores that the thread keeps to, one thread of torch for each; empty: torch's own
            choice.
    """

    at: torch.device
    cores: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.at} cores {self.cores}" if self.cores else str(self.at)

    @contextmanager
    def thread(self) -> Iterator[None]:
        """Let the calling thread work for this device until the end of the block."""
        kept, threads = os.sched_getaffinity(0) if self.cores else None, torch.get_num_threads()
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # of this thread alone
            torch.set_num_threads(len(self.cores))
        try:
            with self.current():
                yield
        finally:
            if kept is not None:
                torch.set_num_threads(threads)
                os.sched_setaffinity(0, kept)

    def current(self) -> AbstractContextManager[object]:
        """Let what is launched go to this device until the end of the block."""
        return torch.cuda.device(self.at) if self.at.type == "cuda" else nullcontext()


def single_cores(count: int) -> list[Device]:
    """Devices of one core each.

    Raises:
        UsageError: this process may run on fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise UsageError(f"devices: found {count} cores; allowed: at most {len(cores)} here")
    return [Device(torch.device("cpu"), (core,)) for core in cores[:count]]


def replica_devices(num_gpus: float | None) -> list[Device]:
    """The devices of a replica: the GPUs that it was given, else the CPU.

    Args:
        num_gpus: as the job asks for; a share of a GPU is one. None: the first one, if there is
            any.

    Raises:
        UsageError: fewer can be seen from here.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = min(1, visible) if num_gpus is None else math.ceil(num_gpus)
    if wanted > visible:
        raise UsageError(
            f"cluster.gpus_per_replica: found {num_gpus:g}; allowed: at most {visible}, the GPUs "
            "that torch sees here"
        )
    if not wanted:
        return [Device(torch.device("cpu"))]
    return [Device(torch.device("cuda", number)) for number in range(wanted)]


def sharers(device: Device, devices: Sequence[Device]) -> int:
    """How many devices have the memory that this one has, itself among them."""
    return sum(other.at == device.at for other in devices)
