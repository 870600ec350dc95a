"""Exits replayed on known text: one parallel pass instead of one token at a time.

Teacher-forced: whatever leaves early, the text goes on as it is known. At each exit all tokens that
are still on their way are decided at once; those that leave keep their state, `h = where(exited, h,
layer(h))`, and give deeper layers the keys/values that the KV policy gives them. Given the text,
this is token for token what the sequential engine does. It runs the engine's own segments.

No threshold changes a prompt's keys/values, for its tokens run or are bridged whoever leaves after
them. So a prompt runs once for all settings; what it left in the pool stays as it is, and only
generated tokens run for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch

from eevp_batch.engine.exits import ExitRule, decayed
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import pack
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ScoredTokens, ShortPrompt
from eevp_batch.errors import UsageError
from eevp_batch.spec import ExitSpec, SamplingSpec
from eevp_batch.tune.beginnings import Beginning
from eevp_batch.tune.forced_row import ForcedRow
from eevp_batch.tune.states import PASS_TOKENS, Row, pool_for, row_groups

Thresholds = Sequence[float]
"""One for each exit layer before the last."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one setting makes of one row's generated tokens, [G] each.

    Attributes:
        exit_layers: after which each would leave.
        token_ids: as which; the last layer's where it leaves there.
        confidences: at the exit where it leaves.
    """

    exit_layers: list[int]
    token_ids: list[int]
    confidences: list[float]


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How the job to be replayed runs.

    Attributes:
        exits: of the job; its thresholds are not used.
        sampling: of the job; greedy.
        prune_layer: the exit layer that cuts the vocabulary; None: no pruning.
        always_kept: ids that pruning never drops.
        proposal: proposes the ids to keep; None: the head itself.
        short_prompt: how much of a prompt runs no further than the first exit; None: nothing.
    """

    exits: ExitSpec
    sampling: SamplingSpec
    prune_layer: int | None
    always_kept: Sequence[int]
    proposal: Proposal | None = None
    short_prompt: ShortPrompt | None = None


class Replay:
    """Replays rows under any number of thresholds.

    Args:
        model: cut at the exit layers of the job, with its fitted exits in use.
        settings: of the job.
        pass_tokens: tokens of a pass.

    Raises:
        UsageError: the job samples, or penalises repetition: its tokens are no function of the
            text alone.
    """

    def __init__(
        self, model: SegmentedModel, settings: ReplaySettings, pass_tokens: int = PASS_TOKENS
    ) -> None:
        sampling = settings.sampling
        if sampling.temperature > 0 or sampling.repetition_penalty != 1.0:
            raise UsageError(
                f"sampling: found temperature {sampling.temperature}, repetition_penalty "
                f"{sampling.repetition_penalty}; allowed: 0 and 1 where exits are replayed"
            )
        self._model, self._settings, self._pass_tokens = model, settings, pass_tokens
        self._reruns = settings.exits.kv in ("recompute", "verify")

    def run(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[Replayed]]:
        """Replay every row under every setting.

        Args:
            rows: prompts and what was generated at full depth.
            grid: thresholds of each setting.

        Returns:
            For each setting, the rows in their order.
        """
        out: list[list[Replayed | None]] = [[None] * len(rows) for _ in grid]
        short = self._settings.short_prompt
        beginning = Beginning([row.prompt_ids for row in rows], short.tail if short else 1)
        groups = row_groups(rows, self._pass_tokens, beginning.length)
        pool = pool_for(self._model, rows, groups, beginning.length)
        beginning.fill(self._model, pool, short)
        rule = self._rule(max(sum(len(rows[n].generated_ids) for n in g) for g in groups))
        for group in groups:
            of_group = [rows[n] for n in group]
            one_pass = _Pass(self._model, pool, rule, self._settings, of_group, beginning)
            # Where keys and values end up exact, no setting changes what any exit sees.
            exact = one_pass.decided(None) if self._reruns else None
            for setting, thresholds in enumerate(grid):
                decided = exact or one_pass.decided(thresholds)
                for number, found in zip(group, one_pass.settle(decided, thresholds), strict=True):
                    out[setting][number] = found
            one_pass.close()
        return [[found for found in rows_found if found is not None] for rows_found in out]

    def _rule(self, num_scored: int) -> ExitRule:
        settings = self._settings
        exits = settings.exits.model_copy(update={"threshold": 0.0})
        if exits.kv == "verify":  # nothing is judged here, so nothing is kept for it
            exits = exits.model_copy(update={"kv": "recompute"})
        return ExitRule(
            head=self._model,
            exit_layers=self._model.exit_layers,
            prune_layer=settings.prune_layer,
            exits=exits,
            sampling=settings.sampling,
            always_kept=settings.always_kept,
            max_resident=num_scored,
            max_batch=num_scored,
            proposal=settings.proposal,
        )


@dataclass(slots=True)
class _Decided:
    """What one exit says of the S tokens of a pass; only of those that came so far, else NaN.

    Attributes:
        confidences: [S] float32.
        token_ids: [S].
    """

    confidences: numpy.ndarray
    token_ids: numpy.ndarray

    @classmethod
    def nothing(cls, count: int) -> _Decided:
        """Of tokens of which none has come."""
        unknown = numpy.full(count, numpy.nan, dtype=numpy.float32)
        return cls(unknown, numpy.zeros(count, dtype=numpy.int64))

    def copy(self) -> _Decided:
        return _Decided(self.confidences.copy(), self.token_ids.copy())


class _Pass:
    """Some rows in the pool: their prompts at every depth, their text to run for every setting.

    Args:
        model: cut at the exit layers.
        pool: large enough for them.
        rule: large enough for their generated tokens.
        settings: of the job.
        rows: one or more.
        beginning: that all of them share, filled.
    """

    def __init__(
        self,
        model: SegmentedModel,
        pool: KvPool,
        rule: ExitRule,
        settings: ReplaySettings,
        rows: Sequence[Row],
        beginning: Beginning,
    ) -> None:
        self._model, self._pool, self._rule, self._settings = model, pool, rule, settings
        self._rows = rows
        self._forced = [ForcedRow(row, model.exit_layers, settings.short_prompt) for row in rows]
        for forced, row in zip(self._forced, rows, strict=True):
            pool.admit(forced, len(row.fed_ids), beginning.pages, beginning.length)
            pool.grow(forced)
        # By depth, what the prompts' last tokens say of the first generated ones.
        self._by_prompts: list[_Decided] = []
        nothing = _Decided.nothing(sum(len(row.generated_ids) for row in rows))
        for depth in range(model.num_segments):
            self._by_prompts.append(self._run(depth, nothing))
            for forced in self._forced:
                forced.mark_filled(depth)
        for forced in self._forced:
            forced.feed()
            pool.grow(forced)
        self._first = self._run(0, self._by_prompts[0])
        # [S, E] where segments after the second begin, for they overwrite it.
        self._hidden = pool.hidden.clone() if model.num_segments > 2 else None

    def close(self) -> None:
        """Give the pages back."""
        for forced in self._forced:
            self._pool.release(forced)

    def decided(self, thresholds: Thresholds | None) -> list[_Decided]:
        """What every exit says of the tokens that reach it; without thresholds all of them do."""
        if self._hidden is not None:
            self._pool.hidden.copy_(self._hidden)
        for forced in self._forced:
            forced.left_at = [self._model.num_segments] * len(forced.left_at)
        found = [self._first]
        for depth in range(1, self._model.num_segments):
            if thresholds is not None:
                self._let_go(depth - 1, found[-1], self._bars(depth - 1, thresholds))
            found.append(self._run(depth, self._by_prompts[depth]))
        return found

    def _let_go(self, depth: int, decided: _Decided, bars: numpy.ndarray) -> None:
        """Note who leaves at an exit; NaN is not above the threshold: it left before."""
        start = 0
        for forced in self._forced:
            stop = start + len(forced.left_at)
            for number in numpy.flatnonzero(decided.confidences[start:stop] > bars[start:stop]):
                forced.left_at[number] = depth
            start = stop

    def settle(self, decided: list[_Decided], thresholds: Thresholds) -> Iterator[Replayed]:
        """Each row's tokens: the first exit that is sure, where the KV policy lets it leave."""
        last = self._model.num_segments - 1
        bars = [self._bars(depth, thresholds) for depth in range(last)]
        start = 0
        for row in self._rows:
            waiting = _WaitingCount(self._settings.exits)
            found = Replayed([], [], [])
            for number, token_id in enumerate(row.generated_ids):
                at, depth = start + number, last
                if waiting.may_leave:
                    sure = (d for d in range(last) if decided[d].confidences[at] > bars[d][at])
                    depth = next(sure, last)
                depth = waiting.leave(depth, last, int(decided[depth].token_ids[at]) == token_id)
                found.exit_layers.append(self._model.exit_layers[depth])
                found.token_ids.append(int(decided[depth].token_ids[at]))
                found.confidences.append(float(decided[depth].confidences[at]))
            start += len(row.generated_ids)
            yield found

    def _bars(self, depth: int, thresholds: Thresholds) -> numpy.ndarray:
        """Threshold [S] float32 of each token at an exit."""
        limit, decay = self._settings.sampling.max_new_tokens, self._settings.exits.decay
        bars = [
            decayed(thresholds[depth], step, limit, decay)
            for row in self._rows
            for step in range(len(row.generated_ids))
        ]
        return numpy.array(bars, dtype=numpy.float32)

    @torch.inference_mode()
    def _run(self, depth: int, known: _Decided) -> _Decided:
        """Run what came this far through a segment, and add what its exit says to what is known."""
        seats: list[int] = []
        steps: list[int] = []
        running, start = [], 0
        for forced in self._forced:
            deciding = forced.deciding(depth)
            seats += [start + number for number in deciding]
            steps += deciding
            running += [forced] if deciding else []
            start += len(forced.left_at)
        found = known.copy()
        if not running:
            return found
        tokens = pack(running, depth, self._pool, self._model.layers.padding)
        states = self._model.run_segment(depth, tokens, self._pool)
        decision = self._rule.decide(depth, states, _scored(seats, steps))
        found.confidences[seats] = decision.confidences
        found.token_ids[seats] = decision.token_ids
        return found


class _WaitingCount:
    """How many tokens wait for the last segment, and so whether the next may leave before it."""

    def __init__(self, exits: ExitSpec) -> None:
        self._verifies = exits.kv == "verify"
        self._cap = exits.max_waiting if exits.kv in ("recompute", "verify") else None
        self._count = 0

    @property
    def may_leave(self) -> bool:
        return self._cap is None or self._count < self._cap

    def leave(self, depth: int, last: int, is_right: bool) -> int:
        """Count a token that leaves at `depth`; under `verify` a wrong one is the last layer's."""
        if self._verifies and not is_right:
            depth = last
        self._count = 0 if depth == last else self._count + 1
        return depth


def _scored(seats: list[int], steps: list[int]) -> ScoredTokens:
    """Tokens each with a seat of its own, so that what is pruned for one is kept for it alone."""
    count = len(seats)
    return ScoredTokens(
        seats=seats,
        seeds=[0] * count,
        steps=steps,
        may_leave=[True] * count,
        context_drafts=[()] * count,
        drafts=[None] * count,
    )
