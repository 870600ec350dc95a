"""The coordinator against many chunks and replicas, on a virtual clock: what it costs, what breaks.

Coordinator, backlog, leases, committer and event log are the real ones; replicas and the bucket are
scripted (`simulated`). For each size: processor time of a decision, the coordinator's memory,
requests to storage per chunk, how long replicas had nothing to do, and what a resume, `status`
and the listing of the output then take.

Usage: python -m tests.bench.simulation [--chunks 1000,10000] [--replicas 2000] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from eevp_batch.cluster import coordinator, deaths, progress, staffing
from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.phases import Phases
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.fingerprint import fingerprint_of
from eevp_batch.storage.plan import Chunk, InputFile, Plan, read_plan
from eevp_batch.storage.status import read_status
from tests.bench.machine import setup, write_json
from tests.bench.simulated import Behaviour, Clock, CountingBucket, Latencies, SimulatedFleet

_Answer = TypeVar("_Answer")
ROWS = 256
NO_WAIT = Latencies(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", default="1000,10000", help="sizes, each in its own process")
    parser.add_argument("--replicas", type=int, default=2000)
    parser.add_argument("--chunk-s", type=float, default=Behaviour.chunk_s)
    parser.add_argument("--life-h", type=float, default=24.0, help="of a replica, mean; 0: endless")
    parser.add_argument("--storage", choices=["bucket", "instant"], default="instant")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_spec(replicas: int) -> JobSpec:
    """The job; nothing but the number of replicas matters."""
    return JobSpec.model_validate(
        {
            "name": "simulation",
            "input": {"path": "s3://bucket/in"},
            "model": {"path": "scripted"},
            "exit": {"mode": "off"},
            "cluster": {"replicas": replicas},
            "output": {"path": "s3://bucket/out"},
        }
    )


def make_plan(num_chunks: int) -> Plan:
    """So many chunks of 256 rows, a hundred in each file."""
    fields: dict[str, Any] = {
        "input.id_column": "id",
        "input.prompt_column": "prompt",
        "input.messages_column": None,
        "input.keep_columns": [],
        "sampling.n": 1,
        "exit.mode": "off",
        "exit.layers": [32],
        "output.token_stats": True,
    }
    files = [
        InputFile(f"s3://bucket/in/part-{number:06d}.parquet", 100 * ROWS, f"{number:064x}")
        for number in range(-(-num_chunks // 100))
    ]
    chunks = [
        Chunk(number, number // 100, number % 100 * ROWS, ROWS, f"{number:064x}")
        for number in range(num_chunks)
    ]
    return Plan(
        format_version=1,
        fingerprint=fingerprint_of(fields),
        fields=fields,
        files=files,
        chunks=chunks,
        num_rows=num_chunks * ROWS,
        id_type="string",
        run_id="simulation-000000000000",
        model="scripted",
        model_revision_or_hash="0" * 64,
    )


def rss_mib() -> float:
    """Resident MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ms(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile, most and number of some durations, ms."""
    ordered = sorted(seconds)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "most_ms": 1e3 * ordered[-1],
        "count": len(ordered),
    }


class Simulation:
    """One job: its run, and what can be asked of its output afterwards."""

    def __init__(self, chosen: argparse.Namespace, num_chunks: int) -> None:
        self.clock = Clock()
        latencies = Latencies() if chosen.storage == "bucket" else NO_WAIT
        self.store = CountingBucket(self.clock, latencies)
        self.spec = make_spec(chosen.replicas)
        self.behaviour = Behaviour(chunk_s=chosen.chunk_s, mean_life_s=3600 * chosen.life_h)
        gc.collect()
        before_mib = rss_mib()
        self.plan = make_plan(num_chunks)
        self.plan_mib = rss_mib() - before_mib
        self.store.add(layout.PLAN, self.plan.to_json().encode())

    def run(self) -> dict[str, Any]:
        """Run the job from its first lease to its last commit."""
        fleet = SimulatedFleet(
            self.spec.cluster.replicas, self.plan, self.clock, self.store, self.behaviour
        )
        committer = Committer(self.store, self.plan)
        phases = Phases(self.spec, self.plan, self.store)
        backlog = Backlog(self.plan, phases.order(), len(self.plan.chunks), 3)
        gc.collect()
        before_mib, bytes_before = rss_mib(), self.store.num_bytes
        cpu_s, requests = time.process_time(), Counter(self.store.requests)
        with (
            patch.object(coordinator, "time", self.clock),
            patch.object(deaths, "time", self.clock),
            patch.object(staffing, "time", self.clock),
            patch.object(progress, "time", self.clock),
        ):
            driver = coordinator.Coordinator(
                spec=self.spec,
                plan=self.plan,
                fleet=fleet,
                committer=committer,
                events=EventLog(self.store),
                backlog=backlog,
                num_done=0,
                totals=ChunkStats(),
                on_progress=lambda found: None,
                on_message=lambda text: None,
                phases=phases,
            )
            driver.run()
            fleet.close()
        cpu_s = time.process_time() - cpu_s
        requests = self.store.requests - requests
        return self._times(fleet) | {
            "cpu_s": cpu_s,
            "replica_deaths": driver.recoveries.replica_deaths,
            "requests_per_chunk": {
                kind: count / len(self.plan.chunks) for kind, count in sorted(requests.items())
            },
            "plan_mib": self.plan_mib,
            # The bucket is in this process: its contents are taken off, its names are not.
            "grown_mib": rss_mib() - before_mib - (self.store.num_bytes - bytes_before) / 2**20,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def _times(self, fleet: SimulatedFleet) -> dict[str, Any]:
        working_s = self.clock.now_s - (fleet.began_s or 0.0)
        busy_s = sum(seconds for seconds, _ in fleet.turns)
        return {
            "virtual_s": self.clock.now_s,
            "chunks_per_virtual_s": len(self.plan.chunks) / working_s,
            "asked_chunks_per_s": self.spec.cluster.replicas / self.behaviour.chunk_s,
            "starved_share": fleet.starved_s / fleet.ready_s,
            "taken_after": ms(fleet.late_s),
            "decision": ms([seconds / count for seconds, count in fleet.turns if count]),
            "turn": ms([seconds for seconds, _ in fleet.turns]),
            "outcomes": sum(count for _, count in fleet.turns),
            "coordinator_share": busy_s / self.clock.now_s,
            "storage_share": self.store.waited_s / self.clock.now_s,
        }

    def afterwards(self) -> dict[str, Any]:
        """What `status`, a listing and a resume with nine tenths done take, of a bucket."""
        self.store.latencies = Latencies()
        found = {"status": self._timed(lambda: read_status(self.store))}
        found["listing"] = self._timed(lambda: sum(1 for _ in self.store.names(layout.DATA_DIR)))
        for chunk_id in range(0, len(self.plan.chunks), 10):
            self.store._remove(layout.commit_record(chunk_id))
        return {**found, "resume": self._timed(self._resume)}

    def _resume(self) -> int:
        """Everything that a resumed run does before its first lease, but for reading the input."""
        plan = read_plan(self.store)
        committer = Committer(self.store, plan)
        committer.clean_attempts()
        done, totals = committer.committed(), committer.totals()
        phases = Phases(self.spec, plan, self.store)
        to_do = (chunk_id for chunk_id in phases.order() if chunk_id not in done)
        backlog = Backlog(plan, to_do, len(plan.chunks) - len(done), 3)
        if backlog.lease("eevp-replica-0", "full") is None:
            raise SystemExit("nothing is left to resume")
        return totals.rows

    def _timed(self, action: Callable[[], object]) -> dict[str, Any]:
        """Processor seconds of an action, its requests, and seconds with the bucket's answers."""
        requests, virtual_s = Counter(self.store.requests), self.clock.now_s
        cpu_s = time.process_time()
        action()
        cpu_s = time.process_time() - cpu_s
        return {
            "cpu_s": cpu_s,
            "requests": dict(sorted((self.store.requests - requests).items())),
            "seconds": cpu_s + self.clock.now_s - virtual_s,
        }


def show(size: int, found: dict[str, Any]) -> None:
    """Print one size's figures."""
    run, after = found["run"], found["afterwards"]
    print(
        f"\n{size:,} chunks: {run['virtual_s']:,.0f} virtual seconds, "
        f"{run['chunks_per_virtual_s']:.1f} chunks/s of {run['asked_chunks_per_s']:.1f} asked for; "
        f"replicas without work {run['starved_share']:.1%}; {run['replica_deaths']} deaths"
    )
    for kind in ("decision", "turn", "taken_after"):
        took = run[kind]
        print(
            f"  {kind:12} median {took['median_ms']:9.3f} ms   p99 {took['p99_ms']:9.3f} ms   "
            f"most {took['most_ms']:9.1f} ms   x {took['count']:,}"
        )
    requests = ", ".join(f"{kind} {n:.2f}" for kind, n in run["requests_per_chunk"].items())
    total = sum(run["requests_per_chunk"].values())
    print(
        f"  time: coordinator {run['coordinator_share']:.1%}, storage {run['storage_share']:.1%}; "
        f"outcomes {run['outcomes']:,}; requests per chunk {total:.2f} ({requests})"
    )
    print(
        f"  memory: plan {run['plan_mib']:.0f} MiB, run {run['grown_mib']:+.0f} MiB, peak with the "
        f"bucket {run['peak_mib']:.0f} MiB"
    )
    for name, took in after.items():
        print(
            f"  {name}: {took['seconds']:,.1f} s, {took['cpu_s']:.1f} s of it processor, "
            f"{sum(took['requests'].values()):,} requests"
        )


def main() -> None:
    """Simulate each size in a process of its own."""
    chosen = options()
    if chosen.one:
        simulation = Simulation(chosen, int(chosen.chunks))
        found = {"run": simulation.run(), "afterwards": simulation.afterwards()}
        print(json.dumps(found))
        return
    every = {}
    for size in map(int, chosen.chunks.split(",")):
        command = [sys.executable, "-m", "tests.bench.simulation", "--one", f"--chunks={size}"]
        for name in ("replicas", "chunk_s", "life_h", "storage"):
            command.append(f"--{name.replace('_', '-')}={getattr(chosen, name)}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        every[str(size)] = json.loads(done.stdout)
        show(size, every[str(size)])
        write_json(chosen.out, {"setup": setup(("eevp-batch",)), "sizes": every})


if __name__ == "__main__":
    main()
