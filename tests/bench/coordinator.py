"""What the coordinator costs per chunk, and what the driver holds, as a job goes on.

10,000 short prompts go through real Ray actors whose engine is scripted, so nearly all that is left
is the cluster's and the storage's own work. Neither the seconds per chunk nor the driver's memory
may follow the number of rows already done.

Usage: python -m tests.bench.coordinator [--rows 10000] [--chunk-rows 10] [--replicas 2]
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from eevp_batch.cluster import coordinator
from eevp_batch.cluster.progress import Progress
from tests.cluster.jobs import make_job
from tests.cluster.scripted import Script

FIFTHS = 5


@dataclass(frozen=True)
class Sample:
    """The driver at one look at its progress."""

    progress: Progress
    cpu_s: float
    rss_mib: float


def sample(progress: Progress) -> Sample:
    """Take one; CPU seconds are those of the whole process, Ray's threads included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(progress, time.process_time(), rss_mib)


def print_fifths(samples: list[Sample], num_chunks: int) -> None:
    """One line for each fifth of the job's chunks, and first against last."""
    edges = [num_chunks * part // FIFTHS for part in range(FIFTHS + 1)]
    marks = [min(samples, key=lambda s: abs(s.progress.chunks_committed - edge)) for edge in edges]
    head = ("chunks done", "rows done", "coordinator ms/chunk", "storage ms/chunk")
    print(" | ".join((*head, "driver CPU ms/chunk", "chunks/s", "driver RSS MiB")))
    lines = []
    for before, after in itertools.pairwise(marks):
        chunks = after.progress.chunks_committed - before.progress.chunks_committed
        elapsed_s = after.progress.elapsed_s - before.progress.elapsed_s
        lines.append(
            (
                after.progress.chunks_committed,
                after.progress.rows_done,
                1e3 * (after.progress.coordinator_s - before.progress.coordinator_s) / chunks,
                1e3 * (after.progress.storage_s - before.progress.storage_s) / chunks,
                1e3 * (after.cpu_s - before.cpu_s) / chunks,
                chunks / elapsed_s,
                after.rss_mib,
            )
        )
        print(
            "{:11} | {:9} | {:20.3f} | {:16.3f} | {:19.3f} | {:8.1f} | {:14.1f}".format(*lines[-1])
        )
    first, last = lines[0], lines[-1]
    print(
        f"last fifth / first fifth: coordinator {last[2] / first[2]:.2f}, storage "
        f"{last[3] / first[3]:.2f}, CPU {last[4] / first[4]:.2f}; RSS {last[6] - first[6]:+.1f} MiB"
    )


def main() -> None:
    """Run the job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--chunk-rows", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    coordinator.LOOK_EVERY_S = 0.1
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(
            Path(folder),
            prompts=options.rows,
            chunk_rows=options.chunk_rows,
            replicas=options.replicas,
        )
        job.on_progress = lambda progress: samples.append(sample(progress))
        result = job.run(Script(max_resident=64))
    print(
        f"{result.totals.rows} rows in {result.chunks} chunks, {options.replicas} replicas: "
        f"{result.working_s:.1f} s of work, {result.wall_s:.1f} s in all"
    )
    print_fifths([s for s in samples if s.progress.replicas_ready], result.chunks)


if __name__ == "__main__":
    main()
