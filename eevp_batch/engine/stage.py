"""The segments of one device: what runs them, and what decides at their exits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from typing import NamedTuple

from eevp_batch.engine.cuda_graphs import SegmentRunner, recorder_for
from eevp_batch.engine.exits import Decision, ExitRule
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.kv_store import KvStore
from eevp_batch.engine.limits import Limits
from eevp_batch.engine.packing import pack
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ScoredTokens, Sequence
from eevp_batch.engine.shortage import is_out_of_memory
from eevp_batch.spec import ExitSpec, SamplingSpec


class Ran(NamedTuple):
    """What a run of a batch through a segment has given.

    Attributes:
        num_tokens: rows that ran.
        scored: positions that were decided, by sequence.
        decision: on them.
    """

    num_tokens: int
    scored: list[range]
    decision: Decision


class Stage:
    """Runs batches through the segments of one device; nothing here waits for another device.

    Args:
        model: the part of the model that is on the device.
        rule: decides at its exits.
        store: its keys and values.
        runner: runs packs through its segments.
    """

    def __init__(
        self, model: SegmentedModel, rule: ExitRule, store: KvStore, runner: SegmentRunner
    ) -> None:
        self.model, self.rule, self.store, self.runner = model, rule, store, runner
        self.depths = model.depths
        self.next: Stage | None = None

    def run(self, depth: int, sequences: SequenceOf[Sequence]) -> Ran | None:
        """What the model and the exits say of a batch; None where memory ran out.

        With the exception go the activations that its traceback keeps alive.
        """
        try:
            with self.model.run_lock:
                tokens = pack(sequences, depth, self.store, self.model.layers.padding)
                states = self.runner.run(depth, tokens)
                scored = ScoredTokens.of(sequences, tokens.scored)
                decision = self.rule.decide(depth, states, scored)
                if self.next is not None and depth + 1 == self.depths.stop:
                    self.rule.hand_on(self.next.rule, scored.seats)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return Ran(tokens.num_tokens, tokens.scored, decision)


def make_rules(
    model: SegmentedModel,
    exits: ExitSpec,
    sampling: SamplingSpec,
    prune_layer: int | None,
    always_kept: SequenceOf[int],
    limits: Limits,
    proposal: Proposal | None,
) -> list[ExitRule]:
    """The exits of each device; what one leaves for a later one is handed on or kept there."""
    rules = [
        ExitRule(
            head=part,
            exit_layers=model.exit_layers,
            prune_layer=prune_layer,
            exits=exits,
            sampling=sampling,
            always_kept=always_kept,
            max_resident=limits.max_resident,
            max_batch=limits.max_batch,
            proposal=proposal,
            borders=model.borders,
        )
        for part in model.parts
    ]
    for rule in rules:
        rule.keep_drafts_with(rules[-1])
    return rules


def make_stages(model: SegmentedModel, rules: list[ExitRule], pool: KvPool) -> list[Stage]:
    """The stages of a model's devices, in the order in which tokens come by."""
    # A recording would hold on to what the other devices' threads do meanwhile.
    recorder = recorder_for(model) if len(model.parts) == 1 else None
    stages = [
        Stage(part, rule, store, SegmentRunner(part, store, recorder))
        for part, rule, store in zip(model.parts, rules, pool.stores, strict=True)
    ]
    for stage, following in pairwise(stages):
        stage.next = following
    return stages
