"""Exits by script: which token leaves is written down beforehand, what it costs is real.

A `ForcedExits` stands where an engine's `ExitRule` was. It lets the rule decide, so that every
check is paid, and then overrules who leaves. The naive policies look at the batch, which ours never
does; `keep_together` gives them queues that never part it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eevp_batch.engine.depth_queues import DepthQueues
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.exits import Decision, ExitRule
from eevp_batch.engine.sampling import uniform
from eevp_batch.engine.segmented_model import SegmentOutput
from eevp_batch.engine.sequence import ScoredTokens, Sequence

NAIVE = ("slowest waits", "mean decides")
POLICIES = ("grouped", *NAIVE)


def trace_leaves(seed: int, step: int, fraction: float) -> bool:
    """Whether the trace lets generated token `step` of a generation leave at the exit."""
    return uniform(seed, step, "trace") < fraction


def draft_stands(seed: int, step: int, acceptance: float) -> bool:
    """Whether generated token `step` stands by script where it was a draft."""
    return uniform(seed, step, "accept") < acceptance


class ForcedExits:
    """Overrules the first exit by a trace; exits behind it hold everybody.

    Args:
        rule: the engine's own.
        fraction: share of the tokens that the trace lets leave.
        policy: `grouped`: each token for itself, as the engine does it. `slowest waits`: a batch
            leaves only if all of it would. `mean decides`: all of a batch leaves if at least half
            of it would, else nobody.
        acceptance: share of the drafts of `verify` that stand, by script too; None: those that the
            last layer agrees with.

    Attributes:
        num_forced_out: tokens that left although the trace holds them.
        num_held_back: tokens that stayed although the trace lets them leave.
        num_decided: tokens at the first exit.
    """

    def __init__(
        self,
        rule: ExitRule,
        fraction: float,
        policy: str = "grouped",
        acceptance: float | None = None,
    ) -> None:
        self._rule, self.fraction, self.policy = rule, fraction, policy
        self._acceptance = acceptance
        self._last, self._vocab_size = rule._last, rule._vocab_size
        self.num_forced_out = self.num_held_back = self.num_decided = 0

    def watch(self, *arguments: Any, **options: Any) -> None:
        """See `ExitRule.watch`."""
        self._rule.watch(*arguments, **options)

    def hand_on(self, other: Any, seats: list[int]) -> None:
        """See `ExitRule.hand_on`."""
        self._rule.hand_on(other._rule, seats)

    def would_leave(self, tokens: ScoredTokens) -> list[bool]:
        """What the trace says of each token: a function of its row and number alone."""
        return [
            trace_leaves(seed, step, self.fraction)
            for seed, step in zip(tokens.seeds, tokens.steps, strict=True)
        ]

    def decide(self, depth: int, states: SegmentOutput, tokens: ScoredTokens) -> Decision:
        """Let the rule decide and pay for it, then go by the trace."""
        decision = self._rule.decide(depth, states, tokens)
        if depth == self._last:
            return self._judged(decision, tokens)
        wanted = self.would_leave(tokens) if depth == 0 else [False] * len(tokens.seats)
        leaves = wanted
        if self.policy == "slowest waits":
            leaves = [all(wanted)] * len(wanted)
        elif self.policy == "mean decides":
            leaves = [2 * sum(wanted) >= len(wanted)] * len(wanted)
        leaves = [x and may for x, may in zip(leaves, tokens.may_leave, strict=True)]
        if depth == 0:
            pairs = list(zip(wanted, leaves, strict=True))
            self.num_decided += len(pairs)
            self.num_forced_out += pairs.count((False, True))
            self.num_held_back += pairs.count((True, False))
        return replace(decision, leaves=leaves)

    def _judged(self, decision: Decision, tokens: ScoredTokens) -> Decision:
        """Drafts stand or fall by script; where one falls, another id takes its place."""
        if self._acceptance is None:
            return decision
        token_ids = list(decision.token_ids)
        for row, draft in enumerate(tokens.drafts):
            if draft is None:
                continue
            if draft_stands(tokens.seeds[row], tokens.steps[row], self._acceptance):
                token_ids[row] = draft
            elif token_ids[row] == draft:
                token_ids[row] = (draft + 1) % self._vocab_size
        return replace(decision, token_ids=token_ids)


class OneBatch(DepthQueues[Sequence]):
    """Queues of a static scheduler: who came furthest goes on, so that a batch is never parted."""

    def _choose(self, waiting: list[int]) -> int:
        return max(waiting)


def keep_together(engine: Engine) -> None:
    """Give an idle engine queues that never part its batch."""
    old = engine.queues
    queues = OneBatch(len(old.lengths), old.max_batch, old.full_batch, old.max_tokens, old.age_cap)
    engine.queues = engine._residents._queues = engine._results.queues = queues


def force(
    engine: Engine, fraction: float, policy: str = "grouped", acceptance: float | None = None
) -> ForcedExits:
    """Put a trace in the place of the engine's rule; no token ends a generation from now on."""
    found = []
    for stage in engine.stages:
        rule = getattr(stage.rule, "_rule", stage.rule)
        stage.rule = ForcedExits(rule, fraction, policy, acceptance)  # type: ignore[assignment]
        found.append(stage.rule)
    engine._results.end_ids = frozenset()
    return found[0]  # type: ignore[return-value]
