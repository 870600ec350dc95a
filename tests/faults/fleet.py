"""A fleet of scripted replicas in one thread: it stands where Ray stands, the rest is real.

Which call ends next is drawn; so is whether a replica gets SIGTERM meanwhile, and whether a lease
that is called off is dropped in time. A replica that was given up while it lived, or whose
coordinator died, may go on with its leases at any later time, in a later run of the job too: a
zombie.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.chunk_work import ChunkWork
from eevp_batch.cluster.fleet import Call, Outcome, Resources, Slot
from eevp_batch.cluster.learning import LearnAttempt, LearnOrder
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.replica import GivenUp, ReplicaReady, encode_rows
from eevp_batch.cluster.selection import select_rows, take_rows
from eevp_batch.records import Audit, Generation, RowFailure
from eevp_batch.spec import JobSpec
from eevp_batch.storage.attempts import Attempt, write_attempt
from eevp_batch.storage.chunks import iter_rows, read_chunk, table_ids, unreadable_rows
from eevp_batch.storage.learned import Learned, write_attempt_files
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store
from tests.cluster.scripted import Script, ScriptedEncoder, ScriptedEngine
from tests.faults.machine import Died, Machine, Process

SIGTERMS = 0.05
"""Of the calls to a replica, how many come when it has just got SIGTERM."""
LEARNED_FILES = {"fitted.json": b'{"layers": [2]}', "fitted.safetensors": bytes(range(64))}


@dataclass(frozen=True)
class Replica:
    """What a replica does with a lease, without its threads.

    Args:
        open_store: opens the output folder as a process of its own.
    """

    open_store: Callable[[], Store]
    plan: Plan
    spec: JobSpec
    script: Script

    def attempt(self, lease: Lease, task: ChunkTask) -> Attempt:
        """Generate for a task's rows and write the attempt."""
        encoder, store, chunk = ScriptedEncoder(), self.open_store(), task.chunk
        source = read_chunk(self.plan, chunk, encoder.columns)
        selection = select_rows(store, task, table_ids(source, self.plan, "input"))
        part = take_rows(source, selection.run)
        prompts, failures = encode_rows(
            iter_rows(part),
            unreadable_rows(part, self.plan.kept_columns),
            self.spec.input.id_column,
            encoder,
            self.plan.num_samples,
            lease.epoch,
            lease.phase,
        )
        work = ChunkWork(lease.epoch, prompts, failures)
        for result in _generate(self.script, work):
            work.settle(result.row_id, self._audited(result, lease))
        work.finish()
        done = work.future.result()
        return write_attempt(
            store,
            self.plan,
            self.spec,
            chunk,
            lease.epoch,
            lease.attempt_no,
            take_rows(source, selection.accounted),
            done.generations,
            selection.failures(done.failures),
            lease.replica,
            1.0,
            lease.phase,
            task.patch.number if task.patch else 0,
            task.pieces if task.is_whole else (),
        )

    def learn(self, token: str) -> LearnAttempt:
        """Learn exits, which are always the same."""
        files = write_attempt_files(self.open_store(), LEARNED_FILES, token)
        return LearnAttempt(token, Learned(None, files, {"layers": [2], "rows": 10}))

    def _audited(self, result: Generation | RowFailure, lease: Lease) -> Generation | RowFailure:
        """Where the job audits, its exits turn out to change every token."""
        is_audited = self.spec.audit.full_depth_fraction and lease.phase == "exits"
        if not is_audited or isinstance(result, RowFailure):
            return result
        return replace(result, audit=Audit(list(reversed(result.token_ids)), 0, 1.0))


def _generate(script: Script, work: ChunkWork) -> Iterator[Generation | RowFailure]:
    engine, line = ScriptedEngine(script), deque(work.prompts)
    while line or not engine.is_idle:
        while line and engine.has_room:
            engine.add(line.popleft())
        yield from engine.step()


@dataclass
class Zombies:
    """Leases that replicas still work at although nobody waits for them; they outlive a run."""

    machine: Machine
    chance: random.Random
    _leases: list[tuple[Process, Replica, Lease, ChunkTask]] = field(default_factory=list)
    num_finished: int = 0

    def add(self, process: Process, replica: Replica, lease: Lease, task: ChunkTask) -> None:
        """A lease that will be worked at some time later."""
        self._leases.append((process, replica, lease, task))

    def lose_power(self) -> None:
        """Forget all of them."""
        self._leases.clear()

    def stir(self) -> None:
        """Perhaps let one finish its attempt now."""
        if not self._leases or self.chance.random() < 0.5:
            return
        index = self.chance.randrange(len(self._leases))
        process, replica, lease, task = self._leases.pop(index)
        try:
            with self.machine.acting_as(process):
                replica.attempt(lease, task)
            self.num_finished += 1
        except Died:
            if self.machine.is_down:
                raise


class ScriptedFleet:
    """What `eevp_batch.cluster.fleet.Fleet` is to the coordinator."""

    def __init__(self, machine: Machine, replica: Replica, size: int, zombies: Zombies) -> None:
        self.slots = [Slot(index) for index in range(size)]
        self.resources = Resources(num_cpus=1, num_gpus=0)
        self._machine, self._replica, self._zombies = machine, replica, zombies
        self._chance = zombies.chance
        self._calls: list[tuple[Slot, Call, Lease | None, ChunkTask | None]] = []
        self._told: set[Process] = set()
        self._called_off: set[int] = set()

    def start(self, slot: Slot) -> None:
        """Start a replica."""
        slot.starts += 1
        slot.handle = Process(slot.name, is_replica=True)
        self._calls.append((slot, "ready", None, None))

    def process(self, slot: Slot, lease: Lease, task: ChunkTask) -> None:
        """Send it a lease."""
        self._calls.append((slot, "process", lease, task))

    def call_off(self, slot: Slot, lease: Lease) -> None:
        """Let it drop a lease, which may come too late."""
        if self._chance.random() < 0.5:
            self._called_off.add(lease.epoch)

    def learn(self, slot: Slot, order: LearnOrder) -> None:
        """Ask it to learn."""
        slot.is_learning = True
        self._calls.append((slot, "learn", None, None))

    def poll(self) -> None:
        """Nobody looks at the progress."""

    def wait(self, timeout_s: float) -> Iterator[Outcome]:
        """Let one call end; where there is none, the time passes that a start has to wait for."""
        self._machine.check_alive()
        self._zombies.stir()
        if not self._calls:
            for slot in self.slots:
                slot.not_before_s = 0.0
            return
        slot, call, lease, task = self._calls.pop(self._chance.randrange(len(self._calls)))
        if self._chance.random() < SIGTERMS:
            self._told.add(slot.handle)
        try:
            with self._machine.acting_as(slot.handle):
                value = self._do(slot, call, lease, task)
        except Died:
            if self._machine.is_down:
                raise
            yield Outcome(slot, call, lease, lost="killed")
            return
        if slot.handle.is_lost:
            yield Outcome(slot, call, lease, lost="cannot be reached")
        else:
            yield Outcome(slot, call, lease, value=value)

    def bury(self, slot: Slot) -> None:
        """Give a replica up; if it lives, its leases may be worked at all the same."""
        for owner, _, lease, task in self._calls:
            if owner is slot and lease is not None and task is not None:
                self._zombies.add(slot.handle, self._replica, lease, task)
        self._calls = [call for call in self._calls if call[0] is not slot]
        slot.clear()

    def close(self) -> None:
        """Give all of them up."""
        for slot in self.slots:
            if slot.handle is not None:
                self.bury(slot)

    def _do(self, slot: Slot, call: Call, lease: Lease | None, task: ChunkTask | None) -> Any:
        is_told = slot.handle in self._told
        if lease is not None and (is_told or lease.epoch in self._called_off):
            return GivenUp(is_told)
        if lease is not None and task is not None:
            return self._replica.attempt(lease, task)
        if call == "learn":
            return self._replica.learn(f"{self._chance.getrandbits(32):08x}")
        size = self._chance.choice([1, 4, 16])
        return ReplicaReady(1, "node", max_resident=size, start_s=0.0, machine={})
