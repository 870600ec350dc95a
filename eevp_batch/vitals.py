"""What an engine says of itself while it runs: plain numbers, for whoever watches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from eevp_batch.row_counts import KeptTokens


@dataclass(frozen=True, slots=True)
class EngineVitals:
    """What an engine holds, and what it has done since it was built.

    Attributes:
        num_layers: L.
        num_kept_ids: K, the ids kept where the vocabulary is cut; None where it is not.
        steps: batches run, by depth.
        rows: sequences in them, by depth.
        kept: of the deep tokens so far, those given up for lack of memory included.
        waiting: sequences in memory that wait, by depth.
        arrivals: sequences that wait for memory.
        pages: pages of keys and values that there are.
        pages_in_use: of them.
    """

    num_layers: int = 0
    num_kept_ids: int | None = None
    steps: Counter[int] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    kept: KeptTokens = field(default_factory=KeptTokens)
    waiting: Sequence[int] = ()
    arrivals: int = 0
    pages: int = 0
    pages_in_use: int = 0

    def after(self, before: EngineVitals) -> EngineVitals:
        """These, with what an engine before this one has done."""
        return replace(
            self,
            steps=before.steps + self.steps,
            rows=before.rows + self.rows,
            kept=before.kept + self.kept,
        )


@runtime_checkable
class Watched(Protocol):
    """An engine that tells more of itself than what a job needs."""

    @property
    def vitals(self) -> EngineVitals:
        """At this moment."""


def vitals_of(engine: object) -> EngineVitals:
    """What an engine tells; one that tells nothing has done and holds nothing."""
    return engine.vitals if isinstance(engine, Watched) else EngineVitals()
