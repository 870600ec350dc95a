"""What a run of a job comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eevp_batch.cluster.progress import Recoveries
from eevp_batch.records import ChunkStats


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job that is done.

    Attributes:
        totals: all of the job's chunks, those that earlier runs committed included.
        totals_before: what earlier runs committed.
        chunks_before: how many chunks that were.
        wall_s: seconds of this run, from Ray's start to `_SUCCESS`.
        working_s: seconds of them from the first replica's readiness to the last commit.
        success: what `_SUCCESS` holds; nothing where a retry leaves chunks to do.
    """

    totals: ChunkStats
    totals_before: ChunkStats
    chunks: int
    chunks_before: int
    wall_s: float
    working_s: float
    recoveries: Recoveries
    success: dict[str, Any]
