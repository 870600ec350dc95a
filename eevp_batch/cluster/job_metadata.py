"""A submitted run's own entry in its job server, seen from inside: its id, and its progress there.

Ray's Jobs API sets a job's metadata once, at its submission. The entry itself is a small JSON in
the cluster's key-value store, which this module rewrites while the job runs, so that the dashboard
shows how far it is. Ray changes the entry only before the job's process starts and after its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
from ray.exceptions import RayError

from eevp_batch.cluster.cluster_job import PROGRESS
from eevp_batch.cluster.progress import Progress

_EVERY_S = 5.0
_PATIENCE_S = 2.0


def submission_id() -> str | None:
    """The submission id of the job that this process is the entry point of; None for any other."""
    try:
        config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
        found = config.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    except (ValueError, AttributeError):
        return None
    return None if found is None else str(found)


class JobEntry:
    """Writes the progress of this process's job into its metadata; does nothing without a job."""

    def __init__(self) -> None:
        self._id = submission_id()
        self._next_s = 0.0

    def update(self, progress: Progress) -> None:
        """Tell it now and then, and at the end; what fails is told the next time."""
        now_s, is_done = time.monotonic(), progress.rows_done >= progress.rows_total
        is_due = now_s >= self._next_s or is_done
        if self._id is None or not is_due or not ray.is_initialized():
            return
        self._next_s = now_s + _EVERY_S
        with contextlib.suppress(RayError, OSError, RuntimeError, ValueError):
            _write(self._id, {PROGRESS: progress_text(progress)})


def progress_text(progress: Progress) -> str:
    """How far a job is, in one line."""
    share = progress.rows_done / progress.rows_total if progress.rows_total else 1.0
    text = f"{progress.rows_done:,} of {progress.rows_total:,} rows ({share:.1%})"
    if progress.rows_error:
        text += f", {progress.rows_error:,} in error"
    if progress.tokens_per_s:
        text += f", {progress.tokens_per_s:,.0f} tokens/s"
    return f"{text}, {progress.replicas_ready} of {progress.replicas} replicas"


def _write(submission: str, metadata: dict[str, str]) -> None:
    """Put keys into the metadata of a job that runs."""
    worker: Any = ray._private.worker.global_worker
    client = worker.gcs_client
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission).encode()
    namespace = ray_constants.KV_NAMESPACE_JOB
    found = client.internal_kv_get(key, namespace, _PATIENCE_S)
    entry: dict[str, Any] = json.loads(found) if found else {}
    if entry.get("status") == "RUNNING":
        entry["metadata"] = {**(entry.get("metadata") or {}), **metadata}
        client.internal_kv_put(key, json.dumps(entry).encode(), True, namespace, _PATIENCE_S)
