"""The throughput model beside measured jobs: one replica, two replicas, twice the rows.

The pace is taken from a job with one replica; jobs with two replicas, and with one and twice the
rows, are predicted from it and run. Kinds: `sleep`, a scripted engine whose steps take a fixed time
in real actors, so that replicas share nothing but the coordinator; and `demo`, the demo model with
one core for each replica. Runs of a round take turns; the machine's other load is noted.

Usage: python -m tests.bench.predicted [--kinds sleep,demo] [--dtype float32] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from eevp_batch.cluster.progress import Progress
from eevp_batch.report.scaling import Pace, measure_pace, predict
from eevp_batch.storage.status import read_events
from eevp_batch.storage.store import Store
from tests.bench.machine import CpuMeter, setup, write_json
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script
from tests.conftest import DEMO_MODEL, ROOT
from tests.real_jobs import write_job

CASES = ((1, 1), (2, 1), (1, 2))
"""Replicas, and rows in multiples of the first job's."""
CHUNK_ROWS = 8
Run = Callable[[Path, int, int], Progress]
"""Runs a job in a folder, with so many replicas and rows."""


def run_sleep(folder: Path, replicas: int, rows: int) -> Progress:
    """A job whose engine sleeps; its last progress."""
    job = make_job(folder, prompts=rows, chunk_rows=CHUNK_ROWS, replicas=replicas)
    found: list[Progress] = []
    job.on_progress = found.append
    job.run(Script(max_resident=32, step_s=0.4, build_s=3.0))
    return found[-1]


def run_demo(dtype: str, folder: Path, replicas: int, rows: int) -> Progress:
    """A job with the demo model in one number type; its last progress."""
    from eevp_batch.cluster.jobs import run_job
    from eevp_batch.prepare import prepare
    from eevp_batch.spec_file import dump_spec
    from eevp_batch.storage.plan import open_plan

    path = write_job(
        folder,
        {
            "input": {"path": f"{ROOT}/jobs/prompts/*.parquet", "limit": rows},
            "model": {"path": str(DEMO_MODEL), "dtype": dtype},
            "exit": {"mode": "off"},
            "sampling": {"max_new_tokens": 48},
            "engine": {"max_resident": 32, "max_batch": 32},
            "cluster": {"replicas": replicas, "cpus_per_replica": 1.0},
            "run": {"chunk_rows": CHUNK_ROWS},
        },
    )
    job = prepare(str(path))
    plan = open_plan(job.store, job.plan, dump_spec(job.spec))
    found: list[Progress] = []
    run_job(
        job.spec,
        job.model,
        plan,
        job.store,
        on_message=lambda text: None,
        on_progress=found.append,
        dashboard=False,
    )
    return found[-1]


ROWS = {"sleep": 400, "demo": 192}


def measure(run: Run, replicas: int, rows: int) -> dict[str, Any]:
    """Run one job; its seconds, its pace, and what else the machine did."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, meter = Path(scratch), CpuMeter(os.getpid())
        progress = run(folder, replicas, rows)
        load = meter.read()
        events = list(read_events(Store.open(folder / "out")))
    commit_s = (progress.coordinator_s + progress.storage_s) / progress.chunks_total
    started = next(event["unix_s"] for event in events if event["event"] == "job_started")
    ended = next(event["unix_s"] for event in events if event["event"] == "job_finished")
    return {
        "total_s": ended - started,
        "pace": asdict(measure_pace(events, commit_s)),
        "foreign_cores": round(load["foreign_cores"], 2),
        "own_cores": round(load["own_cores"], 2),
    }


def compare(kind: str, run: Run, rounds: int) -> list[dict[str, Any]]:
    """Measure every case in turn, predict it from the first one, and put both side by side."""
    base = ROWS[kind]
    runs: list[list[dict[str, Any]]] = [[] for _ in CASES]
    for _ in range(rounds):
        for case, (replicas, times) in enumerate(CASES):
            runs[case].append(measure(run, replicas, base * times))
            print(f"{kind}, {replicas} replica(s): {runs[case][-1]['total_s']:.1f} s", flush=True)
    first = [run["pace"] for run in runs[0]]
    pace = Pace(**{name: statistics.median(p[name] for p in first) for name in first[0]})
    found = []
    for (replicas, times), measured in zip(CASES, runs, strict=True):
        rows = base * times
        prediction = predict(pace, rows, -(-rows // CHUNK_ROWS), replicas)
        seconds = statistics.median(run["total_s"] for run in measured)
        found.append(
            {
                "kind": kind,
                "replicas": replicas,
                "rows": rows,
                "predicted": prediction.to_json(),
                "measured_s": seconds,
                "error": prediction.total_s / seconds - 1,
                "runs": measured,
            }
        )
    return found


def show(cases: list[dict[str, Any]]) -> None:
    """One line for each case."""
    print("kind  | replicas | rows | start | work | drain | verify | predicted | measured | error")
    for case in cases:
        p = case["predicted"]
        print(
            f"{case['kind']:5} | {case['replicas']:8} | {case['rows']:4} | {p['start_s']:5.1f} | "
            f"{p['work_s']:4.1f} | {p['drain_s']:5.1f} | {p['verify_s']:6.1f} | "
            f"{p['total_s']:9.1f} | {case['measured_s']:8.1f} | {case['error']:+.0%}"
        )


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="sleep,demo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="of the demo model")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    chosen = parser.parse_args()
    os.environ["EEVP_DASHBOARD"] = "0"
    runs: dict[str, Run] = {"sleep": run_sleep, "demo": partial(run_demo, chosen.dtype)}
    every: list[dict[str, Any]] = []
    for kind in chosen.kinds.split(","):
        every += compare(kind, runs[kind], chosen.rounds)
        show(every)
        about = setup(("eevp-batch", "torch", "ray")) | {"dtype": chosen.dtype}
        write_json(chosen.out, {"setup": about, "cases": every})


if __name__ == "__main__":
    main()
