"""One history: a job, what happens to it, and the same command again until it is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.cluster import coordinator, jobs, stragglers
from eevp_batch.cluster.local_ray import LocalRay
from eevp_batch.cluster.stragglers import Straggler
from eevp_batch.errors import JobFailedError
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.commit_record import committed_chunks, read_record
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.status import read_events, read_status
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.cluster.jobs import MODEL
from tests.cluster.scripted import Script
from tests.faults.fleet import Replica, ScriptedFleet, Zombies
from tests.faults.local import WatchedDisk
from tests.faults.machine import Crash, Died, Machine, Process

Output = tuple[list[dict[str, Any]], list[dict[str, Any]]]
MOST_RUNS = 30
NOT_COMPARED = {"attempt", "phase", "audit_token_ids", "audit_first_divergence", "audit_distance"}
"""Columns that tell how a row was made, which depends on what happened."""


@dataclass(frozen=True)
class Setting:
    """A job.

    Attributes:
        files: rows of each input file.
        failing: rows that the engine fails.
        empty: rows without a prompt.
        mode: whether the job learns exits, and whether an audit stops them.
    """

    files: tuple[int, ...] = (7, 4)
    chunk_rows: int = 3
    replicas: int = 2
    samples: int = 1
    failing: frozenset[int] = frozenset()
    empty: frozenset[int] = frozenset()
    mode: str = "plain"

    def spec(self, folder: Path) -> JobSpec:
        """Write the input and describe the job."""
        row = 0
        for number, rows in enumerate(self.files):
            ids = list(range(row, row + rows))
            prompts = [None if row_id in self.empty else f"prompt {row_id}" for row_id in ids]
            columns = {"id": pa.array(ids, pa.int64()), "prompt": pa.array(prompts, pa.string())}
            table = pa.table(columns)
            pq.write_table(table, folder / f"in-{number}.parquet", row_group_size=2)
            row += rows
        sections: dict[str, Any] = {}
        if self.mode != "plain":
            sections["exit"] = {"mode": "learn", "learn_rows": 10}
        if self.mode == "audited":
            # So little is allowed that a row or two are enough to stop them.
            sections["audit"] = {"full_depth_fraction": 1.0, "delta": 1e-4, "stop_exits": True}
        return JobSpec.model_validate(
            {
                "name": "history",
                "input": {"path": str(folder / "in-*.parquet")},
                "model": {"path": "scripted"},
                "sampling": {"n": self.samples},
                "cluster": {"replicas": self.replicas, "cpus_per_replica": 1.0},
                "run": {"chunk_rows": self.chunk_rows, "max_error_rate": 1.0},
                "output": {"path": str(folder / "out")},
                **sections,
            }
        )


class Watch(Protocol):
    """An output folder whose operations go to a machine."""

    def store(self) -> Store:
        """The folder, as a process opens it."""

    def plain(self) -> Store:
        """The folder, as an onlooker opens it."""

    def interposed(self) -> AbstractContextManager[None]:
        """Let the machine notice what the package does to storage while the block runs."""

    def lose_power(self, chance: random.Random) -> None:
        """The power goes and comes back."""


class Job:
    """A job on a machine of its own, whose storage is watched.

    Args:
        folder: for input and output.
        machine: counts the points.
        seed: of everything that is drawn.
        watch: the output folder; by default one on a local disk.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        machine: Machine,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.spec, self.machine = setting.spec(folder), machine
        self.watch = watch or WatchedDisk(machine, str(folder / "out"))
        self.script = Script(failing=setting.failing)
        self.chance = random.Random(seed)
        self.zombies = Zombies(machine, self.chance)
        self.settled: set[int] = set()
        self.repairs = False
        self.messages: list[str] = []
        self.runs = 0

    def run(self, crashes: Sequence[Crash] = ()) -> bool:
        """Give the command once; whether it came to its end."""
        self.machine.boot(crashes)
        self.runs += 1
        is_done, earlier = False, self._recorded_and_told()
        with self.watch.interposed():
            try:
                with self.machine.acting_as(Process("coordinator")):
                    is_done = self._command()
            except Died:
                pass
        self._settle(*earlier)
        if self.machine.is_down:
            self.watch.lose_power(self.chance)
            self.zombies.lose_power()
        return is_done

    def _command(self) -> bool:
        """What `submit` does once the job file is read; False where replicas died too often."""
        store = self.watch.store()
        plan = open_plan(store, make_plan(self.spec, MODEL), "version: 1\n")
        replica = Replica(self.watch.store, plan, self.spec, self.script)
        with (
            scripted_ray(lambda size: ScriptedFleet(self.machine, replica, size, self.zombies)),
            drawn_copies(self.chance),
        ):
            try:
                jobs.run_job(
                    self.spec,
                    MODEL,
                    plan,
                    store,
                    on_message=self.messages.append,
                    repairs=self.repairs,
                )
            except JobFailedError as error:
                if "replicas died" not in str(error) and "in a row died" not in str(error):
                    raise
                return False
        return True

    def _recorded_and_told(self) -> tuple[set[int], int]:
        store = self.watch.plain()
        return committed_chunks(store), len(list(read_events(store)))

    def _settle(self, recorded: set[int], num_told: int) -> None:
        """What a run has gone on from, or has told to be committed, has to stay."""
        told = list(read_events(self.watch.plain()))[num_told:]
        if any(event["event"] in ("job_started", "job_resumed") for event in told):
            self.settled |= recorded
        self.settled |= {e["chunk_id"] for e in told if e["event"] == "chunk_committed"}

    def check(self) -> None:
        """Whatever happened: what a record vouches for is there and stays, status can be read.

        A job that is being repaired may be damaged until it is done.
        """
        if self.repairs:
            return
        store = self.watch.plain()
        if not store.exists(layout.PLAN):
            assert not self.settled, "a plan that was gone on from is not there any more"
            return
        read_status(store)
        done = committed_chunks(store)
        lost = self.settled - done
        assert not lost, f"chunks {sorted(lost)} were committed once and are not any more"
        for chunk_id in done:
            record = read_record(store, chunk_id)
            assert record is not None
            attempt = record.attempt
            for path, sha256 in (
                (attempt.data_path, attempt.data_sha256),
                (attempt.errors_path, attempt.errors_sha256),
            ):
                assert path is None or store.sha256(path) == sha256, f"{path} is not the recorded"

    def events(self) -> list[dict[str, Any]]:
        """All that the event log tells."""
        return list(read_events(self.watch.plain()))

    def output(self) -> Output:
        """All rows and all error rows, in order, without what may depend on what happened."""
        store = self.watch.plain()
        return _rows(store, layout.DATA_DIR), _rows(store, layout.ERRORS_DIR)

    def check_done(self) -> None:
        """A finished job verifies, and has left nothing under a name that is not its own."""
        store = self.watch.plain()
        assert verify(store).problems == []
        for folder in (layout.DATA_DIR, layout.ERRORS_DIR, layout.COMMITS_DIR):
            strange = [name for name in store.list(folder) if name.startswith(".")]
            assert not strange, f"left in {folder}: {strange}"
        for folder in ("", layout.META_DIR):
            left = [name for name in store.list(folder) if name.endswith(".tmp")]
            assert not left, f"left in {folder or 'the output folder'}: {left}"
        attempts = store.list(layout.ATTEMPTS_DIR)
        assert self.zombies.num_finished or not attempts, f"attempts that are left: {attempts}"


@contextmanager
def scripted_ray(make_fleet: Callable[[int], ScriptedFleet]) -> Iterator[None]:
    """No Ray: in its place a fleet that follows a script."""

    @contextmanager
    def local_ray(*arguments: Any) -> Iterator[LocalRay]:
        yield LocalRay()

    with (
        patch.object(jobs, "local_ray", local_ray),
        patch.object(jobs, "offered", lambda: [{"CPU": 64.0}]),
        patch.object(jobs, "Fleet", lambda *, size, **options: make_fleet(size)),
    ):
        yield


@contextmanager
def drawn_copies(chance: random.Random) -> Iterator[None]:
    """At every turn a replica without work may take a copy of any chunk."""

    def drawn(found: Iterable[Straggler], speed: float) -> Straggler | None:
        # In an order that does not go by real time.
        return chance.choice([None, *sorted(found, key=lambda one: one.lease.chunk_id)])

    with (
        patch.object(coordinator, "LOOK_EVERY_S", 0.0),
        patch.object(stragglers, "usual_speed", lambda paces: 1.0),
        patch.object(stragglers, "worth_copying", drawn),
    ):
        yield


def live(job: Job, crashes: Sequence[Crash] = ()) -> None:
    """Run the job through the crashes until it is done, and check it throughout.

    Args:
        job: a job that has not begun.
        crashes: in order; those that lie beyond a run's end do not happen.
    """
    for _ in range(MOST_RUNS):
        is_done = job.run(crashes)
        job.check()
        if is_done:
            job.check_done()
            return
        crashes = job.machine.crashes_left
    raise AssertionError(f"the job was not done after {MOST_RUNS} runs")


def _rows(store: Store, folder: str) -> list[dict[str, Any]]:
    found = [
        {name: value for name, value in row.items() if name not in NOT_COMPARED}
        for name in store.list(folder)
        for row in _table(store, f"{folder}/{name}").to_pylist()
    ]
    return sorted(found, key=lambda row: (row["row_id"], row.get("sample_index", 0)))


def _table(store: Store, rel: str) -> Any:
    return pq.read_table(pa.BufferReader(store.read(rel)))
