"""What a Ray must be like before prompts, or anything else, are given to it.

Whoever reaches the dashboard of a Ray without token authentication runs code on its machines
(CVE-2023-48022); Ray before 2.52 also lets any web page that its user visits do so
(CVE-2025-62593).
"""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import ray

from eevp_batch.errors import ClusterError

OLDEST_RAY = (2, 52)
FORCE = "EEVP_ALLOW_OPEN_RAY"

_ANSWER_S = 5.0


def refuse_old_ray(version: str = ray.__version__) -> None:
    """Refuse a Ray with holes that are known.

    Args:
        version: such as 2.52.0.

    Raises:
        ClusterError: it is older than `OLDEST_RAY`.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_RAY:
        allowed = ".".join(map(str, OLDEST_RAY))
        raise ClusterError(f"Ray: found version {version}; allowed: {allowed} or newer")


def refuse_open_dashboard(url: str | None) -> None:
    """Refuse a cluster whose dashboard other machines reach and that asks nobody for a token.

    Args:
        url: host and port of its dashboard, or its URL; None where it has none.

    Raises:
        ClusterError: it is open, and the environment does not say `EEVP_ALLOW_OPEN_RAY=1`.
    """
    if not url or os.environ.get(FORCE) == "1":
        return
    whole = url if "://" in url else f"http://{url}"
    if not _is_loopback(urlsplit(whole).hostname or "") and _answers_anybody(whole):
        raise ClusterError(
            f"Ray dashboard {url}: found no token authentication, so that whoever reaches it runs "
            "code on the cluster; allowed: a cluster started with RAY_AUTH_MODE=token, or "
            f"{FORCE}=1 where only you can reach it"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _answers_anybody(url: str) -> bool:
    """Whether it answers a request that brings no token; a dashboard that is not there does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/version", timeout=_ANSWER_S):
            return True
    except (OSError, ValueError):  # an HTTPError, such as 401, is an OSError
        return False
