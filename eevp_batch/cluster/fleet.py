"""The replicas as Ray sees them: start, call, wait, bury. Decides nothing about chunks.

A *slot* is one of the N replicas that the job may have at a time; when its replica dies the next
one in the slot gets a new name (`eevp-replica-0`, then `eevp-replica-0.2`), so names never collide
and a zombie's results are never taken for its successor's.

A replica first asks for a *place*, a placement group of its own on one node. While Ray has none to
give, that is what an autoscaler sees; the actor is started once the place is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray._private.state import state
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.head_watch import HeadWatch
from eevp_batch.cluster.learning import LearnOrder
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.ray_names import CALLS, actor_name
from eevp_batch.cluster.replica import Replica, ReplicaReady
from eevp_batch.cluster.stragglers import Pace
from eevp_batch.errors import EevpError, JobFailedError

_PID = re.compile(r"\bpid: (\d+)")
_LOOK_AT_NODES_EVERY_S = 5.0
_HEAD_ANSWERS_S = 3.0
_NODES_NAMED = 4
_EXPECTED = "terminated expectedly"  # what Ray says of a node that was told to end

MOST_POLLED = 200
"""Replicas that are asked for their progress at once: each answer is work for the coordinator."""

Call = Literal["place", "ready", "process", "progress", "learn"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one replica asks of Ray."""

    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        return f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"

    @property
    def bundle(self) -> dict[str, float]:
        """The same in Ray's words."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in asked.items() if amount}

    @property
    def num_threads(self) -> int:
        """Threads for tensor work: one per whole CPU."""
        return max(1, int(self.num_cpus))


@dataclass(eq=False)
class Slot:
    """One of the replicas that a job may have.

    Attributes:
        starts: replicas started here so far.
        deaths_in_a_row: replicas of this slot that died since any chunk was last committed.
        not_before_s: monotonic time before which no replica is started here.
        place: its placement group; None where none was asked for.
        handle: its actor; None until it has its place.
        ready: None until the replica's engine is built.
        committed_rows: input rows in committed attempts of the replica.
        is_learning: whether it is asked for exits, and gets no chunks meanwhile.
        is_leaving: whether its process was told to end; it gets nothing more.
        idle_since_s: monotonic time since when it has had nothing to do; None while it has.
        pace: how fast it finishes rows.
    """

    index: int
    starts: int = 0
    deaths_in_a_row: int = 0
    not_before_s: float = 0.0
    place: Any = None
    handle: Any = None
    ready: ReplicaReady | None = None
    max_leases: int = 0
    committed_rows: int = 0
    is_learning: bool = False
    is_leaving: bool = False
    idle_since_s: float | None = None
    progress: LoopProgress = field(default_factory=LoopProgress)
    pace: Pace = field(default_factory=Pace)

    @property
    def is_empty(self) -> bool:
        """Whether no replica is here, nor is a place asked for."""
        return self.handle is None and self.place is None

    @property
    def can_work(self) -> bool:
        """Whether a replica is here that takes chunks."""
        return self.ready is not None and not (self.is_learning or self.is_leaving)

    def clear(self) -> None:
        """Forget the replica that was here."""
        self.place = self.handle = self.ready = self.idle_since_s = None
        self.is_learning = self.is_leaving = False
        self.progress, self.pace, self.committed_rows = LoopProgress(), Pace(), 0

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
        is_told: whether it is lost because its node was told to end.
        failed: what its own code raised.
        is_ours: whether `failed` is an error of this package, which no retry cures.
    """

    slot: Slot
    call: Call
    lease: Lease | None = None
    value: Any = None
    lost: str | None = None
    is_told: bool = False
    failed: str | None = None
    is_ours: bool = False

    @property
    def is_ordinary(self) -> bool:
        """Whether a replica that stays has finished a chunk or told its progress."""
        is_well = self.lost is None and self.failed is None and not self.slot.is_leaving
        return is_well and self.call in ("process", "progress")


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
        head: tells when Ray's head is gone.
    """

    def __init__(
        self,
        namespace: str,
        size: int,
        resources: Resources,
        arguments: tuple[Any, ...],
        stderr_tail: Callable[[int], str],
        head: HeadWatch | None = None,
    ) -> None:
        self._stderr_tail, self._head = stderr_tail, head
        self.slots = [Slot(index) for index in range(size)]
        self.resources = resources
        self._namespace = namespace
        # Stored once, not with each replica that is started.
        self._arguments = [ray.put(argument) for argument in arguments]
        self._actor: Any = ray.remote(Replica)
        self._calls: dict[Any, tuple[Slot, Call, Lease | None]] = {}
        self._nodes_due_s = 0.0
        self._next_polled = 0

    def start(self, slot: Slot) -> None:
        """Ask for a place; its `place` outcome tells when it is there and a replica starts in it.

        The `ready` outcome tells when the replica's engine is built.
        """
        slot.starts += 1
        name = f"{self._namespace}.{slot.name}"
        slot.place = placement_group([self.resources.bundle], strategy="STRICT_PACK", name=name)
        self._remember(slot.place.ready(), slot, "place")

    def _settle_in(self, slot: Slot) -> None:
        """Start the replica of a slot whose place is there."""
        slot.handle = self._actor.options(
            name=actor_name(self._namespace, slot.name),
            namespace=self._namespace,
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(slot.place, 0),
            max_concurrency=1000,
            # The coordinator owns every retry: Ray would repeat a chunk under the same epoch.
            max_restarts=0,
            max_task_retries=0,
        ).remote(slot.name, *self._arguments)
        self._remember(_named(slot, "ready").remote(), slot, "ready")

    def process(self, slot: Slot, lease: Lease, task: ChunkTask) -> None:
        """Send a lease to the slot's replica."""
        self._remember(_named(slot, "process").remote(lease, task), slot, "process", lease)

    def call_off(self, slot: Slot, lease: Lease) -> None:
        """Let the slot's replica drop a lease; its `process` outcome comes all the same."""
        slot.handle.call_off.remote(lease.epoch)

    def learn(self, slot: Slot, order: LearnOrder) -> None:
        """Ask the slot's replica to learn exits."""
        slot.is_learning = True
        self._remember(_named(slot, "learn").remote(order), slot, "learn")

    def poll(self) -> None:
        """Ask replicas that have answered the last poll for their progress, once they can.

        Of more than `MOST_POLLED` those whose turn it is. Those on nodes that are about to go are
        told to leave.
        """
        if time.monotonic() >= self._nodes_due_s:
            self._nodes_due_s = time.monotonic() + _LOOK_AT_NODES_EVERY_S
            self._leave_nodes(_draining_nodes())
        asked = {slot.index for slot, call, _ in self._calls.values() if call == "progress"}
        for _ in range(min(MOST_POLLED, len(self.slots))):
            slot = self.slots[self._next_polled % len(self.slots)]
            self._next_polled += 1
            if slot.handle is not None and slot.index not in asked:
                self._remember(_named(slot, "progress").remote(), slot, "progress")

    def _leave_nodes(self, going: Collection[str]) -> None:
        for slot in self.slots if going else ():
            if slot.ready is not None and slot.ready.node_id in going and not slot.is_leaving:
                slot.handle.leave.remote()

    def wait(self, timeout_s: float) -> Iterator[Outcome]:
        """Wait until a call ends; yields the outcome of each that has.

        Raises:
            JobFailedError: Ray itself has died.
            ClusterError: its head is gone.
        """
        if self._head is not None:
            self._head.check()
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
            outcome = self._outcome(ref, slot, call, lease)
            if call == "place" and outcome.lost is None:
                self._settle_in(slot)
            yield outcome

    def room(self) -> str:
        """What is free on the nodes, in one clause; the largest few where there are many."""
        free = state.available_resources_per_node().values()  # type: ignore[no-untyped-call]
        offers = sorted({(f.get("CPU", 0.0), f.get("GPU", 0.0)) for f in free}, reverse=True)
        return ", or ".join(str(Resources(*offer)) for offer in offers[:_NODES_NAMED])

    def bury(self, slot: Slot) -> None:
        """Make sure that the slot's replica is dead, give its place back, forget its calls."""
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
        remove_placement_group(slot.place)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not slot}
        slot.clear()

    def close(self) -> None:
        """Kill every replica, where there is a head that does it; the others end with us."""
        if self._head is not None and self._head.is_lost:
            return
        for slot in self.slots:
            if not slot.is_empty:
                self.bury(slot)

    def _outcome(self, ref: Any, slot: Slot, call: Call, lease: Lease | None) -> Outcome:
        try:
            return Outcome(slot, call, lease, value=ray.get(ref))
        except RayTaskError as error:
            cause = error.cause
            text = str(error if cause is None else cause)
            return Outcome(slot, call, lease, failed=text, is_ours=isinstance(cause, EevpError))
        except RayError as error:
            text = str(error)
            is_told = _EXPECTED in text or (isinstance(error, ActorDiedError) and error.preempted)
            reason = _reason(text, self._stderr_tail)
            if slot.progress.doing:  # stderr is that of this machine only
                reason += f"\nwhen last heard of, it: {slot.progress.doing}"
            return Outcome(slot, call, lease, lost=reason, is_told=is_told)

    def _remember(self, ref: Any, slot: Slot, call: Call, lease: Lease | None = None) -> None:
        self._calls[ref] = (slot, call, lease)


def _draining_nodes() -> Collection[str]:
    """Ids of the nodes that are about to be taken away; none while Ray's head does not answer."""
    try:
        client = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
        return set(client.get_draining_nodes(timeout=_HEAD_ANSWERS_S))
    except RayError:
        return ()


def _named(slot: Slot, call: Call) -> Any:
    """A method of the slot's replica, its calls under a name for people."""
    return getattr(slot.handle, call).options(name=CALLS[call])


def _reason(text: str, stderr_tail: Callable[[int], str]) -> str:
    """Ray's many-line reason as one line, and what the dead process itself said last."""
    reason = " ".join(text.split())
    pid = _PID.search(reason)
    said = stderr_tail(int(pid[1])) if pid else ""
    return f"{reason}\n{said}" if said else reason
