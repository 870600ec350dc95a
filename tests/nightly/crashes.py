"""Thousands of drawn histories of crashes; ends with an error at the first that goes wrong.

Usage: python -m tests.nightly.crashes [--histories 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import time

from tests.faults.drawn import draw_histories


def main() -> None:
    """Draw, live, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start_s = time.monotonic()
    tally = draw_histories(options.histories, options.seed)
    print(f"{tally}\nseed {options.seed}, {time.monotonic() - start_s:.0f} s: nothing lost")


if __name__ == "__main__":
    main()
