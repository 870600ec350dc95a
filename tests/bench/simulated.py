"""What stands around the coordinator in a simulation: a clock, a bucket and a fleet, all scripted.

The clock is virtual. It stands still while nothing happens, jumps to the next event while the
coordinator waits, and moves by what the coordinator costs: its own processor time, as measured, and
a fixed time for each request to storage. So a coordinator that is too slow makes replicas wait here
as it would in a cluster, and an hour takes as long as its decisions take.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from eevp_batch.cluster.backlog import ChunkTask
from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.fleet import MOST_POLLED, Call, Outcome, Resources, Slot
from eevp_batch.cluster.learning import LearnAttempt, LearnOrder
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.replica import ReplicaReady
from eevp_batch.records import ChunkStats
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.learned import Learned
from eevp_batch.storage.object_store import ObjectStore
from eevp_batch.storage.plan import Plan

LIST_PAGE = 1000


class Clock:
    """Virtual seconds; stands in for the module `time` where only `monotonic` is asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


# --- storage -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latencies:
    """Seconds of one request, by its kind."""

    get: float = 0.015
    put: float = 0.025
    copy: float = 0.025
    delete: float = 0.010
    head: float = 0.008
    list: float = 0.080  # a page of 1,000 names


class CountingBucket(ObjectStore):
    """A bucket in memory that counts requests and lets each take its time.

    It is `ObjectStore` down to the primitive operations. Parts are kept as their sizes.
    """

    def __init__(self, clock: Clock, latencies: Latencies) -> None:
        super().__init__(None, "bucket/out", "s3://bucket/out")
        self._clock, self.latencies = clock, latencies
        self.objects: dict[str, bytes] = {}
        self.folders: dict[str, dict[str, None]] = {}
        self.requests: Counter[str] = Counter()
        self.waited_s = 0.0
        self._counting = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all contents."""
        return sum(map(len, self.objects.values()))

    def add(self, rel: str, data: bytes) -> None:
        """Put an object there without a request."""
        if rel not in self.objects:
            folder, _, name = rel.rpartition("/")
            self.folders.setdefault(folder, {})[name] = None
        self.objects[rel] = data

    def names(self, rel_dir: str) -> Iterator[str]:
        names = list(self.folders.get(rel_dir, {}))
        for start in range(0, max(len(names), 1), LIST_PAGE):
            self._request("list")
            yield from names[start : start + LIST_PAGE]

    def _request(self, kind: str) -> None:
        seconds = getattr(self.latencies, kind)
        if threading.current_thread() is not threading.main_thread():
            seconds /= self.reads_at_once  # as many wait side by side
        with self._counting:
            self.requests[kind] += 1
            self.waited_s += seconds
            self._clock.now_s += seconds

    def _get(self, rel: str) -> bytes:
        self._request("get")
        try:
            return self.objects[rel]
        except KeyError:
            raise FileNotFoundError(rel) from None

    def _put(self, rel: str, data: bytes) -> None:
        self._request("put")
        self.add(rel, data)

    def _create(self, rel: str, data: bytes) -> None:
        self._request("put")
        if rel in self.objects:
            raise FileExistsError(rel)
        self.add(rel, data)

    def _copy(self, src: str, dst: str) -> None:
        self._request("copy")
        if src not in self.objects:
            raise FileNotFoundError(src)
        self.add(dst, self.objects[src])

    def _remove(self, rel: str) -> None:
        self._request("delete")
        if self.objects.pop(rel, None) is not None:
            folder, _, name = rel.rpartition("/")
            del self.folders[folder][name]

    def _exists(self, rel: str) -> bool:
        self._request("head")
        return rel in self.objects

    def _info(self, rel: str) -> Any:
        kind = pa.fs.FileType.File if self._exists(rel) else pa.fs.FileType.NotFound
        return pa.fs.FileInfo(rel, kind, size=len(self.objects.get(rel, b"")))


# --- replicas ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """How replicas behave.

    Attributes:
        chunk_s: mean seconds of work that a chunk is; one after the other on a replica.
        spread: sigma of its logarithm.
        start_s: a replica is ready after half of it to one and a half of it.
        mean_life_s: mean seconds until a replica is taken away; 0: never.
        call_s: seconds on the way to a replica and back.
        look_s: processor seconds that Ray takes to look at one call under way, as measured.
        max_resident: sequences that its engine holds.
    """

    chunk_s: float = 20.0
    spread: float = 0.3
    start_s: float = 60.0
    mean_life_s: float = 0.0
    call_s: float = 0.002
    look_s: float = 0.36e-6
    max_resident: int = 256


class SimulatedFleet:
    """What `eevp_batch.cluster.fleet.Fleet` is to the coordinator; time passes in `wait`.

    Attributes:
        turns: for each wait, processor seconds of the coordinator after it and outcomes that came.
        starved_s: seconds, over all replicas that were ready, without a chunk to work on.
        ready_s: seconds, over all replicas, of being ready.
        began_s: when half of the replicas had come up.
        late_s: for each attempt, seconds until the coordinator took it.
    """

    def __init__(
        self,
        size: int,
        plan: Plan,
        clock: Clock,
        store: CountingBucket,
        behaviour: Behaviour,
        seed: int = 0,
    ) -> None:
        self.slots = [Slot(index) for index in range(size)]
        self.resources = Resources(num_cpus=8, num_gpus=1)
        self._plan, self._clock, self._store = plan, clock, store
        self._behaviour, self._chance = behaviour, random.Random(seed)
        self._events: list[tuple[float, int, Slot, int, Call | None, Lease | None]] = []
        self._numbers = itertools.count()
        self._free_s = [0.0] * size  # when a replica will have done all that it holds
        self._ready_at_s = [0.0] * size
        self._rows = [0] * size
        self._polled: set[int] = set()
        self._next_polled = self._num_calls = 0
        self._resumed_s: float | None = None
        self._num_taken = 0
        self.turns: list[tuple[float, int]] = []
        self.late_s: list[float] = []
        self.starved_s = self.ready_s = 0.0
        self.began_s: float | None = None

    # --- what the coordinator calls ------------------------------------------------------------

    def start(self, slot: Slot) -> None:
        slot.starts += 1
        slot.handle = slot.name
        self._free_s[slot.index], self._rows[slot.index] = 0.0, 0
        start_s = self._behaviour.start_s * self._chance.uniform(0.5, 1.5)
        self._expect(start_s, slot, "ready")
        if self._behaviour.mean_life_s:
            life_s = self._chance.expovariate(1 / self._behaviour.mean_life_s)
            self._expect(start_s + life_s, slot, None)

    def process(self, slot: Slot, lease: Lease, task: ChunkTask) -> None:
        begin_s = self._clock.now_s + self._behaviour.call_s
        free_s = self._free_s[slot.index]
        self.starved_s += max(0.0, begin_s - free_s)
        spread = self._behaviour.spread
        work_s = self._behaviour.chunk_s * self._chance.lognormvariate(-(spread**2) / 2, spread)
        self._free_s[slot.index] = max(begin_s, free_s) + work_s
        self._expect(self._free_s[slot.index] - self._clock.now_s, slot, "process", lease)

    def learn(self, slot: Slot, order: LearnOrder) -> None:
        """It takes as long as a chunk, and no exits are found."""
        slot.is_learning = True
        self._expect(self._behaviour.chunk_s, slot, "learn")

    def call_off(self, slot: Slot, lease: Lease) -> None:
        """The chunk is done to its end all the same, and its attempt then comes too late."""

    def room(self) -> str:
        return "as much as is asked for"

    def poll(self) -> None:
        for _ in range(min(MOST_POLLED, len(self.slots))):
            slot = self.slots[self._next_polled % len(self.slots)]
            self._next_polled += 1
            if slot.ready is not None and slot.index not in self._polled:
                self._polled.add(slot.index)
                self._expect(self._behaviour.call_s, slot, "progress")

    def wait(self, timeout_s: float) -> Iterator[Outcome]:
        self._decided()
        # Ray looks at every call that is under way, twice where one has ended.
        self._clock.now_s += self._behaviour.look_s * 2 * self._num_calls
        until_s = self._clock.now_s + timeout_s
        if self._events and self._events[0][0] <= until_s:
            self._clock.now_s = until_s = max(self._clock.now_s, self._events[0][0])
        outcomes = list(self._due(until_s))
        self._clock.now_s, self._num_taken = until_s, len(outcomes)
        self._resumed_s = time.thread_time()
        yield from outcomes

    def bury(self, slot: Slot) -> None:
        if slot.ready is not None:
            self.ready_s += self._clock.now_s - self._ready_at_s[slot.index]
        slot.clear()
        self._polled.discard(slot.index)

    def close(self) -> None:
        self._decided()
        for slot in self.slots:
            if slot.ready is not None and self._clock.now_s > self._free_s[slot.index]:
                # At its end a job has no more work for it: that is nobody's fault.
                self.ready_s -= self._clock.now_s - self._free_s[slot.index]
            if slot.handle is not None:
                self.bury(slot)

    # --- what happens --------------------------------------------------------------------------

    def _expect(
        self, in_s: float, slot: Slot, call: Call | None, lease: Lease | None = None
    ) -> None:
        """Let a call end, or a replica (None), in so many seconds."""
        self._num_calls += call is not None
        event = (self._clock.now_s + in_s, next(self._numbers), slot, slot.starts, call, lease)
        heapq.heappush(self._events, event)

    def _due(self, until_s: float) -> Iterator[Outcome]:
        """All that has happened by then, to replicas that are still theirs."""
        while self._events and self._events[0][0] <= until_s:
            at_s, _, slot, life, call, lease = heapq.heappop(self._events)
            self._num_calls -= call is not None
            if slot.handle is not None and slot.starts == life:
                yield self._outcome(at_s, until_s, slot, call, lease)

    def _decided(self) -> None:
        """Note what the coordinator cost since it was last given something."""
        if self._resumed_s is not None:
            seconds = time.thread_time() - self._resumed_s
            self.turns.append((seconds, self._num_taken))
            self._clock.now_s += seconds
            self._resumed_s = None

    def _outcome(
        self, at_s: float, now_s: float, slot: Slot, call: Call | None, lease: Lease | None
    ) -> Outcome:
        if call is None:
            return Outcome(slot, "process", lost="preempted")
        if call == "ready":
            self._ready_at_s[slot.index] = self._free_s[slot.index] = now_s
            if self.began_s is None and 2 * sum(map(bool, self._ready_at_s)) >= len(self.slots):
                self.began_s = now_s
            resident = self._behaviour.max_resident
            return Outcome(slot, call, value=ReplicaReady(1, "node", resident, 60.0, {}))
        if call == "progress":
            self._polled.discard(slot.index)
            return Outcome(slot, call, value=self._progress(slot))
        if call == "learn":
            return Outcome(slot, call, value=LearnAttempt("simulated", Learned("no exits here")))
        assert lease is not None
        self.late_s.append(now_s - at_s)
        return Outcome(slot, call, lease, value=self._attempt(slot, lease))

    def _progress(self, slot: Slot) -> LoopProgress:
        rows = self._rows[slot.index]
        return LoopProgress(
            tokens=100 * rows,
            exit_histogram=Counter({8: 60 * rows, 16: 20 * rows, 32: 20 * rows}),
            finished_rows=rows,
            max_resident=self._behaviour.max_resident,
            doing="runs a batch",
        )

    def _attempt(self, slot: Slot, lease: Lease) -> Attempt:
        chunk = self._plan.chunks[lease.chunk_id]
        rows = chunk.num_rows
        self._rows[slot.index] += rows
        path = f"_eevp/attempts/{chunk.name}.e{lease.epoch}.0.parquet"
        self._store.add(path, b"x")  # written by the replica, in its own time
        return Attempt(
            chunk_id=chunk.chunk_id,
            epoch=lease.epoch,
            attempt_no=lease.attempt_no,
            phase=lease.phase,
            replica=lease.replica,
            data_path=path,
            data_sha256="0" * 64,
            data_bytes=1,
            errors_path=None,
            errors_sha256=None,
            errors_bytes=0,
            rows_ok=rows,
            rows_error=0,
            generations=rows,
            id_digest=chunk.id_digest,
            stats=ChunkStats(
                rows_ok=rows,
                generations=rows,
                prompt_tokens=50 * rows,
                generated_tokens=100 * rows,
                busy_s=self._behaviour.chunk_s,
                exit_histogram=Counter({8: 60 * rows, 16: 20 * rows, 32: 20 * rows}),
                finish_reasons=Counter({"eos": rows}),
            ),
            started_unix_s=self._clock.now_s,
            finished_unix_s=self._clock.now_s,
        )
