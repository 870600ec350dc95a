"""What a resume redoes, and how long it takes until its first lease.

The first table is Ray's checkpoint benchmark in our form: a share of the commit records is deleted
at random, and the rows that are made again have to be those of their chunks, no others. The second
part resumes a job of many committed chunks in a process of its own and stops it at its first lease.
Replicas are scripted, everything else is real.

Usage: python -m tests.bench.resume [--records 100000] [--chunks 200] [--folder FOLDER]
           [--out resume.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.cluster import jobs
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.bench.machine import setup
from tests.cluster.jobs import MODEL
from tests.cluster.scripted import Script
from tests.faults.fleet import Replica, ScriptedFleet, Zombies
from tests.faults.history import Job, Setting, live, scripted_ray
from tests.faults.machine import Machine

SHARES = (0.10, 0.25, 0.50, 0.75, 0.90)


@dataclass(frozen=True)
class Redone:
    """What a resume did after records were deleted.

    Attributes:
        deleted: chunks whose records were deleted.
        leased: chunks that were leased.
        rewritten: chunks of whose parts at least one is another file than before.
        rows: rows in the leased chunks.
        rows_deleted: rows in the chunks whose records were deleted.
    """

    deleted: set[int]
    leased: set[int]
    rewritten: set[int]
    rows: int
    rows_deleted: int


def redo(folder: Path, share: float, chunks: int, chunk_rows: int = 3, seed: int = 0) -> Redone:
    """Finish a job, delete a share of its commit records, resume it, and see what was made again.

    Raises:
        AssertionError: the output is not what it was.
    """
    setting = Setting(files=(chunks * chunk_rows,), chunk_rows=chunk_rows, failing=frozenset({1}))
    job = Job(setting, folder, Machine(), seed)
    live(job)
    before, parts = job.output(), _parts(folder / "out")
    records = sorted((folder / "out" / layout.COMMITS_DIR).iterdir())
    deleted = random.Random(seed).sample(records, round(share * len(records)))
    for record in deleted:
        record.unlink()
    num_events = len(_leases(folder / "out"))
    job.settled.clear()
    live(job)
    assert job.output() == before, "the output is what it was"
    leased = _leases(folder / "out")[num_events:]
    now = _parts(folder / "out")
    return Redone(
        deleted={int(record.stem) for record in deleted},
        leased=set(leased),
        rewritten={int(name[-13:-8]) for name in now if now[name] != parts.get(name)},
        rows=len(set(leased)) * chunk_rows,  # the last ones may have been done by two replicas
        rows_deleted=len(deleted) * chunk_rows,
    )


def _parts(out: Path) -> dict[str, tuple[int, int]]:
    found = [*(out / "data").iterdir(), *(out / "errors").iterdir()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def _leases(out: Path) -> list[int]:
    lines = (out / layout.EVENTS).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event["chunk_id"] for event in events if event["event"] == "chunk_leased"]


# --- the start of a resume ----------------------------------------------------------------------


def large_spec(folder: Path) -> JobSpec:
    """A job of one row a chunk."""
    return JobSpec.model_validate(
        {
            "name": "resume",
            "input": {"path": str(folder / "in.parquet")},
            "model": {"path": "scripted"},
            "cluster": {"replicas": 1, "cpus_per_replica": 1.0},
            "run": {"chunk_rows": 1},
            "output": {"path": str(folder / "out")},
        }
    )


def make_large(folder: Path, num_records: int) -> None:
    """Plan a job of one chunk more, and put that many records and empty parts into its output."""
    rows = num_records + 1
    table = pa.table({"id": range(rows), "prompt": [f"prompt {row}" for row in range(rows)]})
    pq.write_table(table, folder / "in.parquet", row_group_size=10_000)
    store, spec = Store.open(folder / "out"), large_spec(folder)
    plan = open_plan(store, make_plan(spec, MODEL))
    model_job = Job(Setting(files=(1,), chunk_rows=1), folder / "one", Machine())
    live(model_job)
    model = json.loads((folder / "one" / "out" / layout.commit_record(0)).read_text())
    for name in (layout.DATA_DIR, layout.COMMITS_DIR):
        (folder / "out" / name).mkdir()
    model |= {"run_id": plan.run_id, "fingerprint": plan.fingerprint}
    for chunk in plan.chunks[:-1]:
        part = layout.data_part(chunk.chunk_id)
        attempt = {"chunk_id": chunk.chunk_id, "data_path": part, "id_digest": chunk.id_digest}
        record = {**model, "attempt": {**model["attempt"], **attempt}}
        text = json.dumps(record, sort_keys=True) + "\n"
        (folder / "out" / layout.commit_record(chunk.chunk_id)).write_text(text)
        (folder / "out" / part).touch()


class _Leased(BaseException):
    """The first lease was handed out."""


class _FirstLease(ScriptedFleet):
    def process(self, *arguments: Any) -> None:
        raise _Leased


def measure(folder: Path) -> dict[str, float]:
    """Resume the job up to its first lease; seconds by step, and peak MiB of this process."""
    before_mib = _peak_mib()
    marks = [("begin", time.monotonic())]
    store, spec = Store.open(folder / "out"), large_spec(folder)
    fresh = make_plan(spec, MODEL)
    marks.append(("plan_s", time.monotonic()))
    plan = open_plan(store, fresh)
    marks.append(("open_plan_s", time.monotonic()))
    machine = Machine()
    replica = Replica(lambda: store, plan, spec, Script())
    zombies = Zombies(machine, random.Random(0))
    try:
        with scripted_ray(lambda size: _FirstLease(machine, replica, size, zombies)):
            jobs.run_job(spec, MODEL, plan, store, on_message=lambda text: None)
    except _Leased:
        marks.append(("to_first_lease_s", time.monotonic()))
    found = {name: at - earlier for (_, earlier), (name, at) in itertools.pairwise(marks)}
    totals_from = time.monotonic()
    rows = Committer(store, plan).totals().rows
    found |= {"of_it_totals_s": time.monotonic() - totals_from, "rows": rows}
    found["all_s"] = marks[-1][1] - marks[0][1]
    return {**found, "imports_mib": before_mib, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Print both tables, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        redone = _print_redone(Path(scratch), options.chunks)
        folder = options.folder or Path(scratch) / "large"
        folder.mkdir(exist_ok=True)
        if not (folder / "out").exists():
            make_large(folder, options.records)
        command = [sys.executable, "-m", "tests.bench.resume", "--measure", "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    resumed = {name: round(value, 2) for name, value in json.loads(done.stdout).items()}
    print(f"resume of {options.records:,} records, seconds and MiB:")
    for name, value in resumed.items():
        print(f"  {name:18} {value:10.2f}")
    if options.out:
        found = {"setup": setup(("eevp-batch", "pyarrow")), "redone": redone}
        found |= {"resume": {"records": options.records, **resumed}}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _print_redone(folder: Path, chunks: int) -> list[dict[str, Any]]:
    redone = []
    print("deleted | chunks | rows to redo | rows redone")
    for share in SHARES:
        found = redo(folder / f"{share}", share, chunks)
        is_exact = found.leased == found.deleted == found.rewritten
        counts = f"{len(found.deleted):6} | {found.rows_deleted:12} | {found.rows:11}"
        print(f"{share:6.0%}  | {counts}{'' if is_exact else '  NOT THOSE CHUNKS'}")
        rows = {"rows_to_redo": found.rows_deleted, "rows_redone": found.rows}
        redone.append({"deleted": share, "chunks": chunks, **rows, "those_chunks": is_exact})
    return redone


if __name__ == "__main__":
    main()
