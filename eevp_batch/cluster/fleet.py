"""The replicas as Ray sees them: start, call, wait, bury. Decides nothing about chunks.

A *slot* is one of the job's N places for a replica; when its replica dies the next one in the slot
gets a new name (`eevp-replica-0`, then `eevp-replica-0.2`), so names never collide and a zombie's
results are never taken for its successor's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.learning import LearnOrder
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.replica import Replica, ReplicaReady
from eevp_batch.errors import EevpError, JobFailedError

_PID = re.compile(r"\bpid: (\d+)")

MOST_POLLED = 200
"""Replicas that are asked for their progress at once: each answer is work for the coordinator."""

Call = Literal["ready", "process", "progress", "learn"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one replica asks of Ray."""

    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        return f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"

    @property
    def num_threads(self) -> int:
        """Threads for tensor work: one per whole CPU."""
        return max(1, int(self.num_cpus))


@dataclass(eq=False)
class Slot:
    """One of the job's places for a replica.

    Attributes:
        starts: replicas started here so far.
        deaths_in_a_row: replicas of this slot that died since any chunk was last committed.
        not_before_s: monotonic time before which no replica is started here.
        ready: None until the replica's engine is built.
        committed_rows: input rows in committed attempts of the replica.
        is_learning: whether it is asked for exits, and gets no chunks meanwhile.
    """

    index: int
    starts: int = 0
    deaths_in_a_row: int = 0
    not_before_s: float = 0.0
    handle: Any = None
    ready: ReplicaReady | None = None
    max_leases: int = 0
    committed_rows: int = 0
    is_learning: bool = False
    progress: LoopProgress = field(default_factory=LoopProgress)

    @property
    def open_rows(self) -> int:
        """Rows that the replica, when last heard of, had finished in uncommitted chunks."""
        return max(0, self.progress.finished_rows - self.committed_rows)

    @property
    def name(self) -> str:
        base = f"eevp-replica-{self.index}"
        return base if self.starts <= 1 else f"{base}.{self.starts}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one call.

    Attributes:
        value: what it returned.
        lost: why the replica must be given up: it died, or Ray cannot reach it.
        failed: what its own code raised.
        is_ours: whether `failed` is an error of this package, which no retry cures.
    """

    slot: Slot
    call: Call
    lease: Lease | None = None
    value: Any = None
    lost: str | None = None
    failed: str | None = None
    is_ours: bool = False


class Fleet:
    """The job's slots and the calls under way.

    Attributes:
        slots: its places for replicas.
        resources: what each replica asks of Ray.

    Args:
        namespace: Ray namespace of the actors.
        size: how many slots.
        resources: what each replica asks of Ray.
        arguments: those of `Replica` after its name.
        stderr_tail: the last lines that a process wrote before it died, by its id.
    """

    def __init__(
        self,
        namespace: str,
        size: int,
        resources: Resources,
        arguments: tuple[Any, ...],
        stderr_tail: Callable[[int], str],
    ) -> None:
        self._stderr_tail = stderr_tail
        self.slots = [Slot(index) for index in range(size)]
        self.resources = resources
        self._namespace = namespace
        # Stored once, not with each replica that is started.
        self._arguments = [ray.put(argument) for argument in arguments]
        self._actor: Any = ray.remote(Replica)
        self._calls: dict[Any, tuple[Slot, Call, Lease | None]] = {}
        self._next_polled = 0

    def start(self, slot: Slot) -> None:
        """Start a replica in an empty slot; its `ready` outcome tells when its engine is built."""
        slot.starts += 1
        slot.handle = self._actor.options(
            name=slot.name,
            namespace=self._namespace,
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus,
            max_concurrency=1000,
            # The coordinator owns every retry: Ray would repeat a chunk under the same epoch.
            max_restarts=0,
            max_task_retries=0,
        ).remote(slot.name, *self._arguments)
        self._remember(slot.handle.ready.remote(), slot, "ready")

    def process(self, slot: Slot, lease: Lease, task: ChunkTask) -> None:
        """Send a lease to the slot's replica."""
        self._remember(slot.handle.process.remote(lease, task), slot, "process", lease)

    def learn(self, slot: Slot, order: LearnOrder) -> None:
        """Ask the slot's replica to learn exits."""
        slot.is_learning = True
        self._remember(slot.handle.learn.remote(order), slot, "learn")

    def poll(self) -> None:
        """Ask replicas that have answered the last poll for their progress, once they can.

        Of more than `MOST_POLLED` those whose turn it is.
        """
        asked = {slot.index for slot, call, _ in self._calls.values() if call == "progress"}
        for _ in range(min(MOST_POLLED, len(self.slots))):
            slot = self.slots[self._next_polled % len(self.slots)]
            self._next_polled += 1
            if slot.handle is not None and slot.index not in asked:
                self._remember(slot.handle.progress.remote(), slot, "progress")

    def wait(self, timeout_s: float) -> Iterator[Outcome]:
        """Wait until a call ends; yields the outcome of each that has.

        Raises:
            JobFailedError: Ray itself has died.
        """
        if not self._calls:
            time.sleep(timeout_s)
            return
        try:
            calls = list(self._calls)
            done, _ = ray.wait(calls, num_returns=1, timeout=timeout_s)
            if done:  # looking at all calls costs the same, however many have ended
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        except RayError as error:
            raise JobFailedError(f"Ray has died: {error}") from error
        for ref in done:
            slot, call, lease = self._calls.pop(ref)
            yield self._outcome(ref, slot, call, lease)

    def bury(self, slot: Slot) -> None:
        """Make sure that the slot's replica is dead, and forget its calls."""
        ray.kill(slot.handle, no_restart=True)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not slot}
        slot.handle = slot.ready = None
        slot.progress, slot.committed_rows, slot.is_learning = LoopProgress(), 0, False

    def close(self) -> None:
        """Kill every replica."""
        for slot in self.slots:
            if slot.handle is not None:
                self.bury(slot)

    def _outcome(self, ref: Any, slot: Slot, call: Call, lease: Lease | None) -> Outcome:
        try:
            return Outcome(slot, call, lease, value=ray.get(ref))
        except RayTaskError as error:
            cause = error.cause
            text = str(error if cause is None else cause)
            return Outcome(slot, call, lease, failed=text, is_ours=isinstance(cause, EevpError))
        except RayError as error:
            reason = _reason(str(error), self._stderr_tail)
            if slot.progress.doing:  # stderr is that of this machine only
                reason += f"\nwhen last heard of, it: {slot.progress.doing}"
            return Outcome(slot, call, lease, lost=reason)

    def _remember(self, ref: Any, slot: Slot, call: Call, lease: Lease | None = None) -> None:
        self._calls[ref] = (slot, call, lease)


def _reason(text: str, stderr_tail: Callable[[int], str]) -> str:
    """Ray's many-line reason as one line, and what the dead process itself said last."""
    reason = " ".join(text.split())
    pid = _PID.search(reason)
    said = stderr_tail(int(pid[1])) if pid else ""
    return f"{reason}\n{said}" if said else reason
