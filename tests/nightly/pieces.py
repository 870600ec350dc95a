"""A long trial, some minutes at a time: a file keeps what each piece of it gave.

Several processes may write to one file. A piece counts once it is written whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Pieces:
    """What was found so far, one JSON line a piece."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def found(self) -> dict[str, Any]:
        """What each piece gave, by its name."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # empty, or cut short when its process was killed
                name, found[name] = json.loads(line)
        return found

    def keep(self, name: str, found: Any) -> None:
        """Add a piece; what it gave is JSON types."""
        # In one write, so that lines do not mix; begun anew, should the last one not be whole.
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps([name, found])}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a trial that may be done in pieces."""
    parser.add_argument("--state", type=Path, help="keeps what was tried; goes on with the rest")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after that")


@contextlib.contextmanager
def pieces_of(options: argparse.Namespace) -> Iterator[Pieces]:
    """Those of `--state`, or of a file of this run alone."""
    with tempfile.TemporaryDirectory() as folder:
        yield Pieces(options.state or Path(folder) / "pieces.jsonl")
