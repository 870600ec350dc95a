"""Exits by script: which token leaves is written down beforehand, what it costs is real.

A `ForcedExits` stands where an engine's `ExitRule` was. It lets the rule decide, so that every
check is paid, and then overrules who leaves. The naive policies look at the batch, which ours never
does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.exits import Decision, ExitRule
from eevp_batch.engine.sampling import uniform
from eevp_batch.engine.segmented_model import SegmentOutput
from eevp_batch.engine.sequence import ScoredTokens

POLICIES = ("grouped", "slowest waits", "mean decides")


class ForcedExits:
    """Overrules the first exit by a trace; exits behind it hold everybody.

    Args:
        rule: the engine's own.
        fraction: share of the tokens that the trace lets leave.
        policy: `grouped`: each token for itself, as the engine does it. `slowest waits`: a batch
            leaves only if all of it would. `mean decides`: all of a batch leaves if at least half
            of it would, else nobody.

    Attributes:
        num_forced: tokens that left although the trace holds them, or stayed although it does not.
        num_decided: tokens at the first exit.
    """

    def __init__(self, rule: ExitRule, fraction: float, policy: str = "grouped") -> None:
        self._rule, self.fraction, self.policy = rule, fraction, policy
        self._last = rule._last
        self.num_forced = self.num_decided = 0

    def watch(self, *arguments: Any, **options: Any) -> None:
        """See `ExitRule.watch`."""
        self._rule.watch(*arguments, **options)

    def would_leave(self, tokens: ScoredTokens) -> list[bool]:
        """What the trace says of each token: a function of its row and number alone."""
        return [
            uniform(seed, step, "trace") < self.fraction
            for seed, step in zip(tokens.seeds, tokens.steps, strict=True)
        ]

    def decide(self, depth: int, states: SegmentOutput, tokens: ScoredTokens) -> Decision:
        """Let the rule decide and pay for it, then go by the trace."""
        decision = self._rule.decide(depth, states, tokens)
        if depth == self._last:
            return decision
        wanted = self.would_leave(tokens) if depth == 0 else [False] * len(tokens.seats)
        leaves = wanted
        if self.policy == "slowest waits":
            leaves = [all(wanted)] * len(wanted)
        elif self.policy == "mean decides":
            leaves = [2 * sum(wanted) >= len(wanted)] * len(wanted)
        leaves = [x and may for x, may in zip(leaves, tokens.may_leave, strict=True)]
        self.num_decided += len(wanted)
        self.num_forced += sum(a != b for a, b in zip(wanted, leaves, strict=True))
        return replace(decision, leaves=leaves)


def force(engine: Engine, fraction: float, policy: str = "grouped") -> ForcedExits:
    """Put a trace in the place of the engine's rule; no token ends a generation from now on."""
    rule = engine._rule
    forced = ForcedExits(getattr(rule, "_rule", rule), fraction, policy)
    engine._rule = forced  # type: ignore[assignment]
    engine._end_ids = frozenset()
    return forced
