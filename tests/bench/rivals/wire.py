"""How a benchmark speaks with a system in a process of its own: JSON lines, one to one.

The standard library is enough for this file, because a rival's interpreter runs it too. The first
line in is the request: model, prompts as token ids, limits, and the system's setting. The first
line out says when the model was loaded and when its first token was there. Then every line in,
`{"rows": N}`, is one timed run over the prompts, from the first again where N is larger, and every
line out what it took and gave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, Protocol

Prompts = list[list[int]]
Outputs = list[list[int]]


class System(Protocol):
    """A loaded model.

    Attributes:
        versions: releases of the packages that matter.
    """

    versions: dict[str, str]

    def first_token(self, prompt: list[int]) -> float:
        """Generate for one prompt; returns `time.monotonic()` when its first token was there."""

    def generate(self, prompts: Prompts) -> tuple[Outputs, dict[str, Any]]:
        """Generate greedily for all prompts; returns their new token ids and what else to note."""


class OneCall:
    """The half of a system that generates by one call, `_run(prompts, max_new_tokens)`."""

    _max_new_tokens: int
    _run: Callable[[Prompts, int], Outputs]

    def first_token(self, prompt: list[int]) -> float:
        """Generate one token."""
        self._run([prompt], 1)
        return time.monotonic()

    def generate(self, prompts: Prompts) -> tuple[Outputs, dict[str, Any]]:
        """Generate for all prompts."""
        return self._run(prompts, self._max_new_tokens), {}


def serve(load: Callable[[dict[str, Any]], System]) -> None:
    """Load what the first line asks for, then run once for every further line.

    Args:
        load: makes the system from the request.
    """
    # Libraries print to standard output as they please; the benchmark reads from it.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    request = json.loads(sys.stdin.readline())
    prompts: Prompts = request["prompts"]
    system = load(request)
    loaded_at = time.monotonic()
    first_token_at = system.first_token(prompts[0])
    system.generate(prompts[: request["warm_up"]])
    reply(
        {
            "loaded_at": loaded_at,
            "first_token_at": first_token_at,
            "ready_at": time.monotonic(),
            "versions": system.versions,
        }
    )
    for line in sys.stdin:
        rows = [prompts[row % len(prompts)] for row in range(json.loads(line)["rows"])]
        started = time.perf_counter()
        outputs, notes = system.generate(rows)
        seconds = time.perf_counter() - started
        reply({"seconds": seconds, "outputs": outputs, **notes})


def up_to_end(ids: Iterable[int], end_ids: list[int]) -> list[int]:
    """Ids up to and including the first that ends a generation."""
    kept = []
    for token_id in ids:
        kept.append(int(token_id))
        if token_id in end_ids:
            break
    return kept


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {package: version(package) for package in packages}
