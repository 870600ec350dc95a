"""What `namespaces.sh` waits for and reports: the cluster's nodes, and events of a job's output.

namespaces_facts.py wait-for-cluster URL NODES PID..    until so many nodes live
namespaces_facts.py wait-for-middle OUT           until three replicas work and chunks are done
namespaces_facts.py report OUT CUT_UNIX_S [FILE COMMAND]  what the cut cost; FILE gets it as JSON
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

from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.bench.machine import setup, write_json

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
        out, cut_s, *kept = arguments
        found = _timeline(_events(out), float(cut_s)) | {"verify": _verified(out)}
        _show(found)
        if kept:
            about = setup(("eevp-batch", "ray", "torch")) | {"command": kept[1]}
            write_json(Path(kept[0]), {"setup": about, **found})


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


def _timeline(events: list[dict[str, Any]], cut_s: float) -> dict[str, Any]:
    """What became of a job in which one node was cut off; seconds count from the job's start."""
    commits = [event for event in events if event["event"] == "chunk_committed"]
    after = [event for event in events if event["unix_s"] > cut_s]
    dead = next((event for event in after if event["event"] == "replica_dead"), None)
    if dead is None:
        sys.exit("no replica was lost after the cut")
    begin_s, end = events[0]["unix_s"], events[-1]
    done_s = [event["unix_s"] for event in commits if event["chunk_id"] in dead["chunks"]]
    return {
        "rows_ok": end["rows_ok"],
        "rows_error": end["rows_error"],
        "chunks": len(commits),
        "chunks_committed_before_the_cut": sum(event["unix_s"] <= cut_s for event in commits),
        "cut_s": round(cut_s - begin_s, 1),
        "noticed_s": round(dead["unix_s"] - begin_s, 1),
        "reason": dead["reason"],
        "chunks_that_went_back": dead["chunks"],
        "these_committed_s": round(max(done_s, default=cut_s) - begin_s, 1),
        "attempts_that_came_too_late": sum(e["event"] == "attempt_discarded" for e in after),
        "ended_s": round(end["unix_s"] - begin_s, 1),
    }


def _verified(out: str) -> dict[str, Any]:
    """What `eevp-batch verify` finds."""
    found = verify(Store.open(out))
    return {"rows_in": found.rows_in, "rows_ok": found.rows_ok, "problems": found.problems}


def _show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        print(f"{name.replace('_', ' '):32} {value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
