"""What an engine counts while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from eevp_batch.engine.sequence import Settled
from eevp_batch.records import TokenExit
from eevp_batch.row_counts import KeptTokens


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was built.

    Attributes:
        steps, rows: segment runs and the sequences in them, by depth.
        packed_tokens: tokens that went through a segment, prompts included.
        shared_tokens: prompt tokens whose keys/values another row had left.
        restarts: how often a sequence had to start again because memory ran out.
        shortages: how often a run found no memory for its activations.
        exit_histogram: emitted tokens by exit layer; a draft counts once it stands.
        accepted_drafts, rejected_drafts: under `verify`, judgements of the last layer on drafts, by
            the layer that these left after: how often each exit agrees with full depth. A draft
            behind a rejected one is not judged.
        kept: of the deep tokens; those of a sequence that starts again count once more.
    """

    steps: Counter[int] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    packed_tokens: int = 0
    shared_tokens: int = 0
    restarts: int = 0
    shortages: int = 0
    finished: int = 0
    exit_histogram: Counter[int] = field(default_factory=Counter)
    accepted_drafts: Counter[int] = field(default_factory=Counter)
    rejected_drafts: Counter[int] = field(default_factory=Counter)
    kept: KeptTokens = field(default_factory=KeptTokens)

    def count(self, settled: Settled) -> None:
        """Add the tokens that stand since a sequence left a segment."""
        self.exit_histogram.update(exit.exit_layer for exit in settled.exits)
        self.accepted_drafts.update(exit.exit_layer for exit in settled.accepted)
        if settled.rejected is not None:
            self.rejected_drafts[settled.rejected.exit_layer] += 1

    def discount(self, exits: list[TokenExit]) -> None:
        """Take tokens back that stood, of a sequence that starts again or is given up."""
        self.exit_histogram.subtract(exit.exit_layer for exit in exits)

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return self.exit_histogram.total()
