"""The tail of a job with one slow replica: with copies of the last chunks, and without, in turns.

Real Ray actors and the real coordinator, storage and leases; the engine is scripted and sleeps, so
that its speed is what the script says whatever the machine does. One of the replicas is slow by a
factor. The tail is the time from when nothing is pending any more, so that somebody has nothing to
do, until the last commit. A run during which the machine paused is done again.

Usage: python -m tests.bench.stragglers [--factors 1,4,16] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from eevp_batch.cluster import stragglers
from eevp_batch.cluster.local_ray import local_ray
from tests.bench.machine import setup, write_json
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script

STEP_S = 0.25
MOST_BETWEEN_LOOKS_S = 3.0
"""The coordinator looks every second; more than that is a pause of the machine."""
MOST_TRIES = 8


def run(folder: Path, factor: float, copies: bool, chosen: argparse.Namespace) -> dict[str, Any]:
    """One job; what its event log tells."""
    folder.mkdir(parents=True)
    job = make_job(folder, chosen.rows, chosen.chunk_rows, chosen.replicas)
    script = Script(
        max_resident=chosen.chunk_rows,
        step_s=STEP_S,
        slow_s=STEP_S * factor,
        once=str(folder / "slow"),
    )
    if copies:
        result = job.run(script)
    else:
        with patch.object(stragglers, "worth_copying", lambda found, speed: None):
            result = job.run(script)
    if job.problems():
        raise RuntimeError(f"the output is not whole: {job.problems()}")
    return {
        **tail(job),
        "working_s": result.working_s,
        "longest_gap_s": max(later - at for at, later in itertools.pairwise(looks(job))),
        "copies": result.recoveries.chunks_copied,
        "copies_first": result.recoveries.copies_first,
        "load": os.getloadavg()[0],
    }


def looks(job: Job) -> list[float]:
    """When the coordinator looked, from the first replica that was ready on."""
    return [found.elapsed_s for found in job.progress if found.replicas_ready]


def run_in_peace(folder: Path, factor: float, copies: bool, chosen: argparse.Namespace) -> Any:
    """As `run`, again where the machine paused."""
    for number in range(MOST_TRIES):
        found = run(folder / str(number), factor, copies, chosen)
        if found["longest_gap_s"] <= MOST_BETWEEN_LOOKS_S:
            return found
        print(f"the machine paused for {found['longest_gap_s']:.0f} s; again", flush=True)
    raise RuntimeError(f"the machine paused in {MOST_TRIES} runs one after the other")


def tail(job: Job) -> dict[str, float]:
    """Seconds from the last lease that was no copy to the last commit, and to each replica's."""
    first = [event for event in job.events("chunk_leased") if not event.get("is_copy")]
    leased_s = max(event["unix_s"] for event in first)
    committed_s = [event["unix_s"] for event in job.events("chunk_committed")]
    return {
        "tail_s": max(committed_s) - leased_s,
        "in_tail": sum(s > leased_s for s in committed_s),
    }


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds."""
    names = ("working_s", "tail_s", "copies", "copies_first")
    return {name: statistics.median(run[name] for run in found) for name in names}


def main() -> None:
    """Run the jobs in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--chunk-rows", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    factors = [float(text) for text in chosen.factors.split(",")]
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name, local_ray(chosen.replicas, dashboard=False):
        for number in range(chosen.rounds):
            for factor in factors:
                for copies in (True, False):
                    key = f"{factor:g} times slower, {'copies' if copies else 'no copies'}"
                    folder = Path(name) / f"{number}-{factor:g}-{copies}"
                    found.setdefault(key, []).append(run_in_peace(folder, factor, copies, chosen))
                    print(key, found[key][-1], flush=True)
    medians = {key: summary(runs) for key, runs in found.items()}
    print("one of the replicas is | working s | tail s | copies | of which first")
    for key, figures in medians.items():
        print(key, *(f"{value:.1f}" for value in figures.values()), sep=" | ")
    about = {**setup(("eevp-batch", "ray", "pyarrow")), "step_s": STEP_S}
    write_json(chosen.out, {"setup": about, "medians": medians, "runs": found})


if __name__ == "__main__":
    main()
