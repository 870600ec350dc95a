"""What `cluster.address` stands for: a Ray of the job's own, one to join, or one to submit to.

| address | what becomes of the job |
|---|---|
| none | runs here, on a Ray of its own |
| `host:port` | is coordinated here; joins the cluster as a driver, from one of its nodes |
| `auto`, `ray://host:port`, `http(s)://host:port` | is submitted to the cluster's job server |
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from eevp_batch.errors import ClusterError, UsageError, first_line
from eevp_batch.uri_secrets import has_secret

_SCHEMES = ("http", "https")


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where a job server is.

    Attributes:
        url: with its scheme, and no slash at its end.
        is_here: whether this machine is one of the cluster's nodes.
    """

    url: str
    is_here: bool


def is_submitted(address: str | None) -> bool:
    """Whether a job with this address goes through a job server.

    Args:
        address: of the job.
    """
    return address is not None and (address == "auto" or "://" in address)


def to_join(address: str | None, is_inside: bool) -> str | None:
    """The address that the process which coordinates a job joins; None for a Ray of its own.

    Args:
        address: of the job.
        is_inside: whether the process was started on a cluster in order to run the job there.
    """
    joins_around = os.environ.get("RAY_ADDRESS") if address is None else is_submitted(address)
    return "auto" if is_inside and joins_around else address


def default_address() -> str | None:
    """The cluster that the environment names, `auto` or a URI; None where it names none."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return named if named is not None and "://" in named else ("auto" if named else None)


def api_server(address: str, patience_s: float) -> ApiServer:
    """Find the job server of a cluster.

    Args:
        address: `auto`, ray:// or http(s)://.
        patience_s: how long to wait for the head of the cluster.

    Raises:
        UsageError: it holds a password, which messages and pages would repeat.
        OSError, RuntimeError, ValueError, RayError: it cannot be found.
    """
    if address == "auto":
        address = default_address() or "auto"
    if has_secret(address):
        raise UsageError(
            "the cluster's address: found a password in it; allowed: a token as Ray takes it "
            "(RAY_AUTH_MODE=token), or headers in RAY_JOB_HEADERS"
        )
    if address == "auto":
        return ApiServer(_from_head(patience_s), is_here=True)
    if address.partition("://")[0] in _SCHEMES:
        return ApiServer(address.rstrip("/"), is_here=False)
    return ApiServer(_from_client_server(address, patience_s), is_here=False)


def unreachable(address: str, verb: str, error: BaseException) -> ClusterError:
    """One kind of error, in one line, for whatever Ray and HTTP raise.

    Args:
        address: of the job.
        verb: what cannot be done with the cluster: it cannot be joined, or reached.
        error: what was raised.
    """
    # Not every Ray that will do has the class.
    is_refusal = type(error).__name__ == "AuthenticationError"
    said = "refused us" if is_refusal else f"cannot be {verb}"
    found = ClusterError(
        f"cluster.address {address!r}: the Ray cluster {said}: {first_line(error)}"
    )
    if is_refusal:
        found.add_note(
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, to its token"
        )
    return found


def _from_head(patience_s: float) -> str:
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.dashboard.utils import ray_address_to_api_server_url

    found = str(canonicalize_bootstrap_address_or_die("auto"))
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), patience_s).close()
    return str(ray_address_to_api_server_url(found))


def _from_client_server(address: str, patience_s: float) -> str:
    """Ask the server of Ray's client, which knows where the dashboard is."""
    from ray.dashboard.utils import ray_client_address_to_api_server_url

    parts = urlsplit(address)
    socket.create_connection((parts.hostname or "", parts.port or 10001), patience_s).close()
    return str(ray_client_address_to_api_server_url(address))
