"""What `namespaces.sh` waits for and reports: the cluster's nodes, and events of a job's output.

namespaces_facts.py wait-for-cluster URL NODES PID..    until so many nodes live
namespaces_facts.py wait-for-middle OUT           until three replicas work and chunks are done
namespaces_facts.py report OUT CUT_UNIX_S         what the cut cost
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PATIENCE_S = 1800.0
_REPLICAS, _CHUNKS = 3, 4


def main(what: str, *arguments: str) -> None:
    """Do one of the three."""
    if what == "wait-for-cluster":
        url, nodes, *pids = arguments
        _wait_for(f"{nodes} node(s)", lambda: _living(url, pids) >= int(nodes))
    elif what == "wait-for-middle":
        _wait_for("the middle of the job", lambda: _is_in_middle(_events(arguments[0])))
    else:
        _report(_events(arguments[0]), float(arguments[1]))


def _wait_for(what: str, condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            sys.exit(f"{what} did not come to pass within {_PATIENCE_S:.0f} s")
        time.sleep(0.2)
    print(f"{what}: there")


def _living(url: str, pids: Sequence[str]) -> int:
    """How many nodes of a cluster live, whose processes were started with these ids."""
    if not all(Path("/proc", pid).exists() for pid in pids):
        sys.exit("a node has not come up")
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{url}/api/v0/nodes?limit=100", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
    except (OSError, ValueError, KeyError, TypeError):  # it comes up
        return 0
    return sum(node["state"] == "ALIVE" for node in nodes)


def _events(out: str) -> list[dict[str, Any]]:
    path = Path(out) / "_eevp" / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _is_in_middle(events: list[dict[str, Any]]) -> bool:
    count = Counter(event["event"] for event in events)
    if count["job_failed"] or count["job_finished"]:
        sys.exit(f"the job has ended before it could be disturbed: {events[-1]}")
    return count["replica_ready"] >= _REPLICAS and count["chunk_committed"] >= _CHUNKS


def _report(events: list[dict[str, Any]], cut_s: float) -> None:
    commits = [event for event in events if event["event"] == "chunk_committed"]
    after = [event for event in events if event["unix_s"] > cut_s]
    dead = next((event for event in after if event["event"] == "replica_dead"), None)
    count = Counter(event["event"] for event in after)
    end = events[-1]
    print(f"rows                         {end['rows_ok']} ok, {end['rows_error']} in error")
    print(f"chunks                       {len(commits)}")
    before = sum(event["unix_s"] <= cut_s for event in commits)
    print(f"committed before the cut     {before}")
    print(f"cut after                    {cut_s - events[0]['unix_s']:.1f} s of the job")
    if dead is None:
        sys.exit("no replica was lost after the cut")
    held = dead["chunks"]
    print(f"the cluster noticed after    {dead['unix_s'] - cut_s:.1f} s")
    print(f"leases that went back        {len(held)} (chunks {', '.join(map(str, held))})")
    done_s = [event["unix_s"] for event in commits if event["chunk_id"] in held]
    print(f"these committed after        {max(done_s, default=cut_s) - cut_s:.1f} s, by others")
    print(f"attempts that came too late  {count['attempt_discarded']}")
    print(f"the job ended after          {end['unix_s'] - events[0]['unix_s']:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
