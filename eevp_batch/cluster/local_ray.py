"""A Ray of the job's own on this machine: bound to 127.0.0.1, quiet, and gone when the job is.

It is started as a new cluster whatever else runs here, in a folder of its own. `guard.py` sees to
it that nothing stays behind when this process is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.job_config import JobConfig

from eevp_batch.cluster import guard
from eevp_batch.cluster.environment import environment
from eevp_batch.cluster.head_watch import HeadWatch, watched_head, watched_ray
from eevp_batch.cluster.ray_safety import refuse_old_ray
from eevp_batch.errors import ClusterError, first_line

# Only leases, attempts and counters cross Ray; the job's spec and plan are the largest objects.
_OBJECT_STORE_BYTES = 128 << 20
_MARKER = "EEVP_RAY_SESSION"
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A replica without a GPU keeps the environment's own CUDA settings.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray binds to the loopback address only where it believes that no other node can ever join;
    # it replaces a 127.0.0.1 that it is given by the address that other machines see.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A Ray to run on.

    Attributes:
        dashboard_url: None where there is no dashboard.
        logs: folder of its processes' own logs; None where that is not this machine's.
        head: tells when its head is gone.
        targets: file that tells Prometheus where its metrics are; only with a dashboard.
    """

    dashboard_url: str | None = None
    logs: Path | None = None
    head: HeadWatch | None = None
    targets: Path | None = None

    def tail(self, pid: int, num_lines: int = 10) -> str:
        """The last lines that a worker process wrote to its stderr; empty where unknown."""
        lines: list[str] = []
        for path in self.logs.glob(f"worker-*-{pid}.err") if self.logs else ():
            lines += path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


@contextlib.contextmanager
def local_ray(
    num_cpus: int, dashboard: bool, metadata: dict[str, str] | None = None
) -> Iterator[LocalRay]:
    """Start a local Ray for the block, or use the one that this process is already connected to.

    Args:
        num_cpus: logical CPUs that replicas may ask for.
        dashboard: whether to serve the dashboard on 127.0.0.1, where its packages are installed.
        metadata: what Ray is told of the job.

    Raises:
        ClusterError: Ray did not start, or is too old to be safe.
    """
    refuse_old_ray()
    if ray.is_initialized():
        with watched_head() as head:
            yield LocalRay(logs=current_logs(), head=head)
        return
    folder = _short_folder()
    marker = uuid.uuid4().hex
    with _guarded(f"{_MARKER}={marker}", folder):
        try:
            local = _start(num_cpus, dashboard, folder, marker, metadata)
        except BaseException:  # an interrupt among them
            ray.shutdown()
            raise
        with watched_ray() as head:
            yield replace(local, head=head)


def _start(
    num_cpus: int, dashboard: bool, folder: str, marker: str, metadata: dict[str, str] | None
) -> LocalRay:
    be_quiet()
    with environment({**_VARIABLES, _MARKER: marker}), _loopback_kept():
        try:
            context: Any = ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=None if dashboard else False,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=JobConfig(metadata=metadata),
                _temp_dir=folder,
            )
        except Exception as error:  # it raises bare ones too, where the machine is slow
            raise ClusterError(f"the local Ray did not start: {first_line(error)}") from error
    url = context.dashboard_url if dashboard else None
    return LocalRay(
        dashboard_url=f"http://{url}" if url else None,
        logs=Path(folder) / "session_latest" / "logs",
        targets=Path(folder) / PROMETHEUS_SERVICE_DISCOVERY_FILE if url else None,
    )


def current_logs() -> Path | None:
    """Where the Ray that this process is connected to logs on this machine."""
    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node else None


@contextlib.contextmanager
def _loopback_kept() -> Iterator[None]:
    """Set what Ray reads from the environment only when it is imported, which may be long ago.

    Set back afterwards: a cluster that this process starts next has other machines to talk to.
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def be_quiet() -> None:
    """Keep Ray's reports of dead workers off our stdout; the coordinator tells of them."""
    ray._private.worker._worker_logs_enabled = False


@contextlib.contextmanager
def _guarded(marker: str, folder: str) -> Iterator[None]:
    """Run the guard beside the block; it cleans up after both a clean and a sudden end."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, marker, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stdin = process.stdin
    try:
        yield
    finally:
        if stdin is not None:
            stdin.close()
        process.wait()


def _short_folder() -> str:
    """A folder for Ray's session; near the root, as paths of sockets end at 107 characters."""
    parent = "/tmp" if os.access("/tmp", os.W_OK) else None
    return tempfile.mkdtemp(prefix="eevp-", dir=parent)
