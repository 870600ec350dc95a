"""A Ray cluster that is there already: joined as one driver among others, and left as it was."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import RayError
from ray.job_config import JobConfig

from eevp_batch.cluster.addresses import unreachable
from eevp_batch.cluster.head_watch import watched_head, watched_ray
from eevp_batch.cluster.local_ray import LocalRay, be_quiet, current_logs
from eevp_batch.cluster.ray_safety import refuse_old_ray, refuse_open_dashboard

_CONNECT_S = 10.0
_TRIES, _PAUSE_S = 3, 5.0


@contextlib.contextmanager
def attached_ray(address: str, metadata: dict[str, str] | None = None) -> Iterator[LocalRay]:
    """Join a cluster for the block, or use what this process is connected to already.

    Its processes are nobody's to end here: only the replicas that the block starts end with it, or
    with this process, however that ends.

    Args:
        address: `auto`, or host and port of its head; a node of it runs on this machine.
        metadata: what Ray is told of the job.

    Raises:
        ClusterError: it cannot be reached, it refused us, or it lets anybody in.
    """
    found = _checked(address)
    if ray.is_initialized():
        with watched_head() as head:
            yield LocalRay(logs=current_logs(), head=head)
        return
    refuse_old_ray()
    be_quiet()
    joined = _joined(address, found, metadata)
    with watched_ray() as head:
        refuse_open_dashboard(joined.dashboard_url)
        yield LocalRay(logs=current_logs(), head=head)


def _joined(address: str, found: str, metadata: dict[str, str] | None) -> Any:
    """What `ray.init` gives; its head is there, so that a busy one gets several tries."""
    tries = 1
    while True:
        try:
            return ray.init(
                address=found,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=JobConfig(metadata=metadata),
            )
        except ConnectionError as error:
            if tries == _TRIES:
                raise unreachable(address, "joined", error.__cause__ or error) from error
        except (RuntimeError, ValueError, OSError, RayError) as error:
            raise unreachable(address, "joined", error) from error
        tries += 1
        time.sleep(_PAUSE_S)


def _checked(address: str) -> str:
    """The address that an address stands for, if anybody listens there; Ray would try for long."""
    try:
        found = str(canonicalize_bootstrap_address_or_die(address))
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:  # a ConnectionError is an OSError
        raise unreachable(address, "joined", error) from error
    return found
