"""A job on a cluster of several raylets while a killer goes about: nothing may be lost or changed.

A tiny random model with exits runs on two replicas, each on a raylet of its own
(`ray.cluster_utils.Cluster`): first undisturbed, then while replicas, raylets and, twice, the
driver are killed with SIGKILL. When each happens, and to whom, is drawn from the seed; the time is
told in chunks that are committed, so that every kill falls into work. A driver that was killed is
started again by the same command. In the end every kind of recovery must have been seen, the output
must be complete and equal to the undisturbed one, and `verify` must find nothing wrong; then the
table is printed.

Usage: python -m tests.nightly.chaos [--minutes 10] [--seed 0] [--out chaos.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from tests.bench.machine import setup
from tests.plain_output import committed_parts, events, read_rows
from tests.real_jobs import write_job
from tests.tiny_models import save_model

NUM_NODES = 2  # that replicas stand on; the head holds none
CHUNK_ROWS = 8
SECONDS_PER_KILL = 20.0
DRIVER_KILLS = 2
PILOT_ROWS = 400
WORKING_SHARE = 0.5
"""Of the minutes; the rest goes into starts."""
CONFIDENCE_ROUNDING = 1e-5
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "that", "sleeps")


@dataclass(frozen=True)
class Kill:
    """One thing that happens, once so many chunks are committed."""

    after_chunks: int
    kind: str  # replica, raylet or driver


@dataclass
class Done:
    """What the killer has done.

    Attributes:
        replicas: ids of the processes of those that were killed.
        nodes: ids of the raylets that were killed.
        drivers: exit codes of those that were killed.
    """

    replicas: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    drivers: list[int] = field(default_factory=list)


def draw_kills(seed: int, num_chunks: int, num_replicas: int, num_raylets: int) -> list[Kill]:
    """When what is killed, between 5 and 90 % of the chunks."""
    rng = random.Random(seed)
    kinds = ["replica"] * num_replicas + ["raylet"] * num_raylets + ["driver"] * DRIVER_KILLS
    rng.shuffle(kinds)
    first, last = num_chunks // 20, num_chunks * 9 // 10
    return [
        Kill(after, kind)
        for after, kind in zip(
            sorted(rng.sample(range(first, last), len(kinds))), kinds, strict=True
        )
    ]


@contextlib.contextmanager
def raylets() -> Iterator[Cluster]:
    """A head without CPUs, and nodes of one CPU each."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def make_job(folder: Path, model: Path, num_rows: int, address: str) -> Path:
    """The job over rows that are all a little different."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        " ".join([str(row), *(WORDS[row % 7 : row % 7 + 1 + row % 6])]) for row in range(num_rows)
    ]
    table = pa.table({"id": [f"q{row:06}" for row in range(num_rows)], "prompt": prompts})
    pq.write_table(table, folder / "prompts.parquet")
    fields = {
        "input": {"path": "prompts.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {"layers": [2, 4], "threshold": 0.3},
        "sampling": {"max_new_tokens": 96},
        "engine": {"max_resident": 4},
        "cluster": {"address": address, "replicas": NUM_NODES},
        "run": {"chunk_rows": CHUNK_ROWS, "max_attempts": 100},
    }
    return write_job(folder, fields)


class Chaos:
    """Runs one job to its end while the kills happen.

    Args:
        cluster: what it runs on.
        job: its file.
        kills: in order.
        seed: of who is killed.
    """

    def __init__(self, cluster: Cluster, job: Path, kills: list[Kill], seed: int) -> None:
        self._cluster, self._job, self._out = cluster, job, job.parent / "out"
        self._kills, self._rng = list(kills), random.Random(seed)
        self._unnoticed: set[str] = set()  # replicas that were killed
        self.done = Done()

    def run(self) -> None:
        """Start the same command until it is done."""
        while True:
            said = self._job.parent / f"driver-{len(self.done.drivers)}.txt"
            with said.open("w") as stderr:
                command = [sys.executable, "-m", "eevp_batch", "run", str(self._job)]
                driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
                try:
                    was_killed = self._accompany(driver)
                finally:
                    driver.kill()
                    code = driver.wait()
            if was_killed:
                self.done.drivers.append(code)
            elif code == 0:
                return
            else:
                raise AssertionError(f"the driver ended with {code}: {said.read_text()}")

    def _accompany(self, driver: subprocess.Popen[bytes]) -> bool:
        """Kill what is due until the driver ends; whether it was killed here."""
        while driver.poll() is None:
            time.sleep(0.2)
            if not self._kills or self._num_committed() < self._kills[0].after_chunks:
                continue
            self._unnoticed -= {e["replica"] for e in self._log() if e["event"] == "replica_dead"}
            if self._unnoticed:  # each death is put right before the next one
                continue
            kind = self._kills[0].kind
            if kind == "driver":
                # Only one that has come to work, so that another one has something to do again.
                if not self._living():
                    continue
                driver.kill()
                self._tell(self._kills.pop(0))
                return True
            victim = self._kill_raylet() if kind == "raylet" else self._kill_replica()
            if victim:
                self._tell(self._kills.pop(0))
        return False

    def _tell(self, kill: Kill) -> None:
        text = f"{self._num_committed()} chunks committed: killed a {kill.kind}"
        print(text, file=sys.stderr, flush=True)

    def _num_committed(self) -> int:
        return len(list((self._out / "_eevp" / "commits").glob("*.json")))

    def _log(self) -> list[dict[str, Any]]:
        """Events since the last driver began."""
        log = events(self._out)
        starts = [i for i, e in enumerate(log) if e["event"] in ("job_started", "job_resumed")]
        return log[starts[-1] :] if starts else []

    def _living(self) -> list[dict[str, Any]]:
        """`replica_ready` of the last driver's replicas that nobody has killed and that work."""
        log = self._log()
        gone = {e["replica"] for e in log if e["event"] == "replica_dead"}
        ready = [e for e in log if e["event"] == "replica_ready" and e["replica"] not in gone]
        return [e for e in ready if e["node_id"] not in self.done.nodes and is_alive(e["pid"])]

    def _kill_replica(self) -> bool:
        living = self._living()
        if not living:
            return False
        victim = self._rng.choice(living)
        os.kill(victim["pid"], signal.SIGKILL)
        self._unnoticed.add(victim["replica"])
        self.done.replicas.append(victim["pid"])
        return True

    def _kill_raylet(self) -> bool:
        """Kill one with a replica on it; another node joins."""
        nodes = {node.node_id: node for node in self._cluster.worker_nodes}
        living = [ready for ready in self._living() if ready["node_id"] in nodes]
        if not living:
            return False
        victim = self._rng.choice(living)["node_id"]
        self._unnoticed |= {e["replica"] for e in living if e["node_id"] == victim}
        self.done.nodes.append(victim)
        self._cluster.remove_node(nodes[victim], allow_graceful=False)
        self._cluster.add_node(num_cpus=1)
        return True


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def recoveries(out: Path, done: Done) -> dict[str, int]:
    """What the event log says was put right, by what had been killed."""
    log = events(out)
    counts: Counter[str] = Counter()
    working: dict[str, dict[str, Any]] = {}
    for event in log:
        if event["event"] == "replica_ready":
            working[event["replica"]] = event
        elif event["event"] == "replica_dead":
            ready = working.pop(event["replica"], None)
            if ready is None:
                cause = "it had not come up yet"
            elif ready["pid"] in done.replicas:
                cause = "its process was killed"
            else:
                cause = "its raylet was killed" if ready["node_id"] in done.nodes else "unknown"
            counts[f"replicas replaced: {cause}"] += 1
            counts["chunks leased again"] += len(event["chunks"])
        elif event["event"] == "job_resumed":
            counts["drivers that went on"] += 1
    return dict(counts)


def check(out: Path, undisturbed: Path, num_rows: int, done: Done) -> dict[str, int]:
    """Assert that all of it fired and that nothing shows in the output; the counters."""
    found = recoveries(out, done)
    assert done.drivers == [-signal.SIGKILL] * DRIVER_KILLS, f"drivers ended with {done.drivers}"
    assert found["drivers that went on"] == DRIVER_KILLS, "each was followed by one that went on"
    assert done.replicas and done.nodes, "replicas and raylets were killed"
    for kind in ("process", "raylet"):
        assert found[f"replicas replaced: its {kind} was killed"] > 0, f"no {kind} was recovered"
    assert found["chunks leased again"] > 0, "they died with work under way"
    expected = {row["row_id"]: row for row in read_rows(undisturbed)}
    rows = read_rows(out)
    assert len(rows) == len(expected) == num_rows, "every row is there once"
    for row in rows:
        other = expected.pop(row["row_id"])
        exact = other.keys() - {"attempt", "exit_confidences"}
        different = sorted(column for column in exact if row[column] != other[column])
        assert not different, f"row {row['row_id']} differs in {different}"
        pairs = zip(row["exit_confidences"], other["exit_confidences"], strict=True)
        assert all(abs(a - b) <= CONFIDENCE_ROUNDING for a, b in pairs), row["row_id"]
    assert {path.stem[5:] for path in (out / "data").iterdir()} == set(committed_parts(out)), (
        "a file lies under data/ that no commit record vouches for"
    )
    command = [sys.executable, "-m", "eevp_batch", "verify", str(out)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    return found


def rate(out: Path) -> dict[str, float]:
    """Tokens, seconds from the first replica's readiness to the last commit, and their ratio."""
    log = events(out)
    ready = next(event["unix_s"] for event in log if event["event"] == "replica_ready")
    commits = [event for event in log if event["event"] == "chunk_committed"]
    tokens = sum(event["generated_tokens"] for event in commits)
    seconds = commits[-1]["unix_s"] - ready
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": tokens / seconds}


def run(
    folder: Path, num_rows: int, num_replicas: int, num_raylets: int, seed: int
) -> dict[str, Any]:
    """Both runs, the checks, and what there is to report."""
    model = save_model("llama", folder / "model")
    with raylets() as cluster:
        calm = make_job(folder / "calm", model, num_rows, cluster.address)
        Chaos(cluster, calm, [], seed).run()
        job = make_job(folder / "chaos", model, num_rows, cluster.address)
        kills = draw_kills(seed, -(-num_rows // CHUNK_ROWS), num_replicas, num_raylets)
        chaos = Chaos(cluster, job, kills, seed)
        started_s = time.monotonic()
        chaos.run()
        wall_s = time.monotonic() - started_s
    out, undisturbed = job.parent / "out", calm.parent / "out"
    counters = check(out, undisturbed, num_rows, chaos.done)
    rates = {"undisturbed": rate(undisturbed), "chaos": rate(out)}
    lost = 1 - rates["chaos"]["tokens_per_s"] / rates["undisturbed"]["tokens_per_s"]
    return {
        "rows": num_rows,
        "chunks": -(-num_rows // CHUNK_ROWS),
        "seed": seed,
        "killed": {
            "replicas": len(chaos.done.replicas),
            "raylets": len(chaos.done.nodes),
            "drivers": len(chaos.done.drivers),
        },
        "recovered": counters,
        "wall_s": round(wall_s, 1),
        "rates": rates,
        "throughput_lost": round(lost, 4),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as lines of a table."""
    lines = [("rows", found["rows"]), ("chunks", found["chunks"])]
    lines += [(f"{name} killed", count) for name, count in found["killed"].items()]
    lines += found["recovered"].items()
    lines += [
        (f"tokens/s, {name}", f"{of['tokens_per_s']:.0f} ({of['seconds']:.0f} s)")
        for name, of in found["rates"].items()
    ]
    lines.append(("throughput lost", f"{found['throughput_lost']:.1%}"))
    lines.append(("rows that differ from the undisturbed run", 0))
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def rows_for(minutes: float, folder: Path) -> int:
    """About as many rows as make the job last so long, kills and all; a short job tells."""
    with raylets() as cluster:
        job = make_job(folder, save_model("llama", folder / "m"), PILOT_ROWS, cluster.address)
        Chaos(cluster, job, [], 0).run()
    seconds = rate(folder / "out")["seconds"]
    return int(PILOT_ROWS / seconds * 60 * minutes * WORKING_SHARE)


def main() -> None:
    """Run it once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rows", type=int, help="instead of what the minutes need")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        num_rows = options.rows or rows_for(options.minutes, Path(name) / "pilot")
        num_kills = int(options.minutes * 60 / SECONDS_PER_KILL)
        num_raylets = max(1, num_kills // 3)
        num_replicas = max(1, num_kills - num_raylets)
        found = run(Path(name), num_rows, num_replicas, num_raylets, options.seed)
    print(table(found))
    if options.out:
        packages = ("eevp-batch", "ray", "torch", "transformers")
        whole = {"setup": setup(packages), **found}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the program leaves: native threads may abort it later
