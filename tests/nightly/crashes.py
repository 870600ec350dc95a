"""A crash at every point of the commit protocol, then thousands of drawn histories of crashes.

Ends with an error at the first job that does not come out as if nothing had happened.

Usage: python -m tests.nightly.crashes [--histories 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.faults.drawn import draw_histories
from tests.faults.machine import Kind
from tests.faults.sweep import EVERYTHING, sweep

KINDS: tuple[Kind, ...] = ("kill", "power cut")


def main() -> None:
    """Sweep, draw, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start_s = time.monotonic()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            crashed = sweep(EVERYTHING, Path(folder), (kind,)).crashed
        print(f"{kind} at each point: {crashed.total()} crashes at {len(crashed)} named points")
    print(draw_histories(options.histories, options.seed))
    print(f"seed {options.seed}, {time.monotonic() - start_s:.0f} s: every output is undisturbed")


if __name__ == "__main__":
    main()
