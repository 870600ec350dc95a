"""A crash at every point of the commit protocol, then thousands of drawn histories of crashes.

Ends with an error at the first job that does not come out as if nothing had happened.

With `--state` this may be done a few minutes at a time: the file keeps what was tried, the same
command goes on with the rest, and what is printed counts all of it.

Usage: python -m tests.nightly.crashes [--histories 2000] [--seed 0]
           [--state crashes.jsonl [--seconds 300]] [--out crashes.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.machine import setup
from tests.faults.drawn import Tally, draw_histories
from tests.faults.machine import Kind
from tests.faults.sweep import EVERYTHING, sweep
from tests.nightly.pieces import Pieces, add_arguments, pieces_of

KINDS: tuple[Kind, ...] = ("kill", "power cut")
_PER_ROUND = 100  # histories
Found = dict[str, Any]


def _sweep(kind: Kind) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        crashed = sweep(EVERYTHING, Path(folder), (kind,)).crashed
    return {"kind": kind, "crashes": crashed.total(), "named_points": len(crashed)}


def _draw(count: int, first_seed: int) -> Found:
    return vars(draw_histories(count, first_seed))


def _tasks(histories: int, first_seed: int) -> dict[str, Callable[[], Found]]:
    """What there is to do, by the names of the pieces."""
    tasks = {f"{kind} at each point": partial(_sweep, kind) for kind in KINDS}
    for start in range(0, histories, _PER_ROUND):
        count, seed = min(_PER_ROUND, histories - start), first_seed + start
        tasks[f"{count} histories, seed {seed}"] = partial(_draw, count, seed)
    return tasks


def _go_on(tasks: dict[str, Callable[[], Found]], pieces: Pieces, seconds: float) -> list[Found]:
    """Do those tasks of which nothing is known yet, until the time is over; all that is known."""
    start_s, known = time.monotonic(), pieces.found()
    for name, task in tasks.items():
        before_s = time.monotonic()
        if name not in known and before_s - start_s < seconds:
            found = task()
            pieces.keep(name, {"seconds": round(time.monotonic() - before_s, 1), **found})
    known = pieces.found()
    return [known[name] for name in tasks if name in known]


def main() -> None:
    """Sweep, draw, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    add_arguments(parser)
    options = parser.parse_args()
    tasks = _tasks(options.histories, options.seed)
    with pieces_of(options) as pieces:
        found = _go_on(tasks, pieces, options.seconds)
    seconds = sum(piece.pop("seconds") for piece in found)
    sweeps = [piece for piece in found if "kind" in piece]
    tally = sum((Tally.from_json(p) for p in found if p not in sweeps), start=Tally())
    for one in sweeps:
        print(f"{one['kind']} at each point: {one['crashes']} at {one['named_points']} points")
    print(tally)
    print(f"seed {options.seed}, {seconds:.0f} s: every output is undisturbed")
    if len(found) < len(tasks):
        sys.exit(f"{len(tasks) - len(found)} of {len(tasks)} pieces are left")
    if options.out:
        whole = {"setup": setup(("eevp-batch", "hypothesis", "pyarrow")), "seed": options.seed}
        whole |= {"seconds": round(seconds), "sweeps": sweeps, "drawn": vars(tally)}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
