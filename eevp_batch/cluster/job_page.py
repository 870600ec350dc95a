"""Keeps a submitted job's entry in the Ray dashboard up to date: how far it is, and where to.

Ray has no call for that. The entry is a JSON object in the head's key-value store, where Ray itself
writes it (`ray.dashboard.modules.job.common.JobInfo`): as the job starts, and when its driver has
ended. In between it is the driver's alone. A job that was not submitted has no entry; its name and
output are in the metadata that its driver joins with.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from ray._private.ray_constants import KV_NAMESPACE_JOB
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from eevp_batch.cluster.progress import Progress

TELL_EVERY_S = 5.0


class JobPage:
    """The entry of the job that this process is the driver of.

    Args:
        metadata: what else is to stand there.
    """

    def __init__(self, metadata: dict[str, str]) -> None:
        self._metadata = metadata
        found = own_submission_id()
        self._key = (
            None if found is None else JobInfoStorageClient.JOB_DATA_KEY.format(job_id=found)
        )
        self._due_s = 0.0

    def tell(self, progress: Progress) -> None:
        """Write how far the job is, at most every 5 seconds, while Ray says that it runs."""
        now_s = time.monotonic()
        if self._key is None or now_s < self._due_s:
            return
        self._due_s = now_s + TELL_EVERY_S
        with contextlib.suppress(RayError):  # whether Ray still lives is found out elsewhere
            self._write(self._key, describe(progress))

    def _write(self, key: str, text: str) -> None:
        # Ray declares bytes, and gives None where there is no such key.
        entry: bytes | None = _internal_kv_get(key, namespace=KV_NAMESPACE_JOB)
        if not entry:
            return
        changed = updated(json.loads(entry), text, self._metadata)
        if changed is not None:
            value = json.dumps(changed)
            _internal_kv_put(key, value, overwrite=True, namespace=KV_NAMESPACE_JOB)


def updated(entry: dict[str, Any], text: str, metadata: dict[str, str]) -> dict[str, Any] | None:
    """An entry with a job's progress in it; None where the job does not run."""
    if entry.get("status") != "RUNNING":
        return None
    known = entry.get("metadata") or {}
    return {**entry, "message": text, "metadata": {**known, **metadata, "eevp_progress": text}}


def describe(progress: Progress) -> str:
    """One line: `2,560 of 10,000 rows (26 %), 3 in error, 812 tokens/s, 12 min left`."""
    share = progress.rows_done / progress.rows_total if progress.rows_total else 1.0
    facts = [f"{progress.rows_done:,} of {progress.rows_total:,} rows ({share:.0%})"]
    facts[0] = facts[0].replace("%)", " %)")
    if progress.rows_error:
        facts.append(f"{progress.rows_error:,} in error")
    if progress.tokens_per_s is not None:
        facts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.eta_s is not None:
        facts.append(f"{progress.eta_s / 60:,.0f} min left")
    return ", ".join(facts)


def own_submission_id() -> str | None:
    """What Ray's Jobs API told this process of itself; None where it was not started by that."""
    config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    found = config.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    return None if found is None else str(found)
