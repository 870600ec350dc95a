"""May this token leave here? Confidence, thresholds, and the token it leaves as."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from eevp_batch.engine.confidence import confidence, total_lse
from eevp_batch.engine.drafts import Sampler
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.pruned_vocab import (
    exact_best,
    gathers_natively,
    prune,
    pruned_scores,
)
from eevp_batch.engine.sampling import penalise
from eevp_batch.engine.score_summary import first_argmax, summarise
from eevp_batch.engine.segmented_model import SegmentOutput
from eevp_batch.engine.sequence import ScoredTokens
from eevp_batch.engine.upload import to_device
from eevp_batch.errors import UsageError
from eevp_batch.spec import DecaySpec, ExitSpec, SamplingSpec

DECIDED_ROWS = 64
"""Most tokens decided at once on a CPU: their scores, 6 MB in bfloat16, are still in the cache."""
ID_COST = 20
"""Ids of the dense product with the head that cost as much as one id read by the kernel: per row of
49,152 ids in bfloat16, 140 us dense; 60 us for 1,024 kept ids."""
GATHER_LIMIT = 1.0
"""Without the kernel, head rows are gathered while B * K stays below this multiple of V, counted at
the largest batch (64 rows, K = 256: 3 to 4 ms; K = 1024: 12 to 17 ms; dense 9 to 12 ms). Never by
the batch at hand, so that a row's scores are computed the same way whoever its batch mates are."""

_WASTED = (
    "exit.vocab.proposal saves nothing: to rescore %d ids for each of %d rows takes longer than "
    "to score the whole vocabulary"
)
_log = logging.getLogger(__name__)


class Head(Protocol):
    """What exits need of a model."""

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, E]."""

    def normed_at(self, exit_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What `scores` takes of the states at an exit, [B, E] -> [B, E]."""

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """Scores over the whole vocabulary, [B, E] -> [B, V] of the model's type."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of each scored token; plain lists, moved to the host in one copy.

    Attributes:
        token_ids: the token that each would leave as; where that was a draft to be judged, the
            draft exactly if it stands.
        confidences: at this exit.
        leaves: whether it leaves.
        is_finite: False where the model's scores were not finite; nothing else counts then.
        is_kept: whether the token was among the ids kept; None where it had to be, or where nothing
            was cut. Of a sequence's tokens, only the last one's answer counts: a seat remembers no
            other.
    """

    token_ids: list[int]
    confidences: list[float]
    leaves: list[bool]
    is_finite: list[bool]
    is_kept: list[bool | None]


def decayed(threshold: float, step: int, max_steps: int, decay: DecaySpec | None) -> float:
    """The threshold at generated token `step`, falling from confident to bold.

    CALM (arXiv 2207.07061, equation 5): clip(0.9 lambda + 0.1 exp(-tau t / T), 0, 1). With
    `decay.scaled` both terms are scaled by the threshold, as the code of arXiv 2410.18952 does.
    """
    if decay is None:
        return threshold
    fading = 0.1 * math.exp(-decay.temperature * step / max_steps)
    if decay.scaled:
        return threshold * (0.9 + fading)
    return min(max(0.9 * threshold + fading, 0.0), 1.0)


def _by_depth(thresholds: float | list[float], early: Sequence[int]) -> dict[int, float]:
    """The threshold of each exit before the last; of none where exits are off."""
    each = thresholds if isinstance(thresholds, list) else [thresholds] * len(early)
    return dict(zip(early, each, strict=False))


def _is_gathering_cheaper(weight: torch.Tensor, k: int, max_batch: int) -> bool:
    """Whether scoring K ids one by one costs less than a product with the head [V, E]."""
    if gathers_natively(weight):
        return k * ID_COST < len(weight)
    return max_batch * k < GATHER_LIMIT * len(weight)


def _columns(
    proposal: Proposal | None, always: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Ids [C] int32 of a proposal's columns, None for all; the columns of those always kept."""
    if proposal is None or proposal.ids is None:
        return None, always
    return proposal.ids.to(torch.int32), torch.searchsorted(proposal.ids, always)


def _checked_k(top_k: int, widest: int, num_always: int) -> int:
    """K, at most as many ids as there are."""
    k = min(top_k, widest)
    if k < num_always:
        raise UsageError(
            f"exit.vocab.top_k: found {k}; allowed: at least {num_always}, "
            "for the end and stop ids are always kept"
        )
    return k


class ExitRule:
    """Decides at every exit; holds what the pruned vocabulary leaves behind from exit to exit.

    Args:
        head: norm and LM head of the model.
        exit_layers: e_1 < ... < e_D.
        prune_layer: the exit layer that cuts the vocabulary, or None for no pruning.
        exits: thresholds, confidence, K.
        sampling: how a token is chosen.
        always_kept: ids that pruning never drops (end and stop ids).
        max_resident: seats.
        max_batch: most rows per call; decides once how pruned scores are computed.
        proposal: proposes the ids to keep; None: the head itself.
        borders: 0-based segments after which nobody may leave and nothing is decided.

    Raises:
        UsageError: K is smaller than the number of ids that are always kept.
    """

    def __init__(
        self,
        head: Head,
        exit_layers: Sequence[int],
        prune_layer: int | None,
        exits: ExitSpec,
        sampling: SamplingSpec,
        always_kept: Sequence[int],
        max_resident: int,
        max_batch: int,
        proposal: Proposal | None = None,
        borders: Collection[int] = (),
    ) -> None:
        self._head, self._exits, self._sampling = head, exits, sampling
        self._proposal, self._borders = proposal, borders
        weight = head.head_weight
        self._device, self._vocab_size = weight.device, weight.shape[0]
        self._exit_layers, self._last = exit_layers, len(exit_layers) - 1
        self._prune_depth = None if prune_layer is None else list(exit_layers).index(prune_layer)
        early = [depth for depth in range(self._last) if depth not in borders]
        self._thresholds = _by_depth(exits.threshold, early)
        always = torch.tensor(sorted(set(always_kept)), dtype=torch.int64).to(self._device)
        self._column_ids, self._always_columns = _columns(proposal, always)
        widest = self._vocab_size if self._column_ids is None else len(self._column_ids)
        self._k = _checked_k(exits.vocab.top_k or widest, widest, len(always))
        self._gathers = _is_gathering_cheaper(weight, self._k, max_batch)
        if proposal is not None and not proposal.is_exact and not self._gathers:
            _log.warning(_WASTED, self._k, max_batch)
        if self._prune_depth is not None:
            shape = (max_resident, self._k)
            self._kept_ids = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._outside = torch.zeros(max_resident, device=self._device)
        self._penalises = sampling.repetition_penalty != 1.0
        if self._penalises:
            shape = (max_resident, self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        widest = self._k if self._prune_depth == 0 else self._vocab_size
        self._sampler = Sampler(
            sampling=sampling,
            max_resident=max_resident,
            max_drafts=exits.max_waiting if exits.kv == "verify" else 0,
            num_choices=min(widest, sampling.top_k or widest),
            vocab_size=self._vocab_size,
            device=self._device,
        )

    @property
    def num_kept(self) -> int | None:
        """K, the ids kept where the vocabulary is cut; None where it is not."""
        return None if self._prune_depth is None else self._k

    def watch(self, seat: int, token_ids: Sequence[int], *, start: bool = False) -> None:
        """Tell which ids stand in a seat's sequence; `start` forgets the seat's last sequence."""
        if not self._penalises or not token_ids:
            return
        if start:
            self._seen[seat] = False
        self._seen[seat, to_device(token_ids, torch.int64, self._device)] = True

    def decide(self, depth: int, states: SegmentOutput, tokens: ScoredTokens) -> Decision:
        """Decide for each scored token whether it leaves after segment `depth`, and as what.

        Args:
            depth: 0-based exit; at the last one every token leaves.
            states: [S, E] states of the scored tokens.
            tokens: what else is known of them.
        """
        count = len(tokens.seats)
        if depth in self._borders:
            return Decision(
                [0] * count, [0.0] * count, [False] * count, [True] * count, [None] * count
            )
        num_parts = 1 if self._device.type == "cuda" else -(-count // DECIDED_ROWS)
        step = -(-count // num_parts)
        parts = [slice(start, start + step) for start in range(0, count, step)]
        columns = [self._decide(depth, states.part(part), tokens.part(part)) for part in parts]
        host = torch.cat(columns, dim=1).tolist()  # the one host sync
        return Decision(
            token_ids=[int(token_id) for token_id in host[0]],
            confidences=host[1],
            leaves=[
                depth == self._last or (may_leave and bool(leave))
                for may_leave, leave in zip(tokens.may_leave, host[2], strict=True)
            ],
            is_finite=[bool(good) for good in host[3]],
            is_kept=[bool(kept) for kept in host[4]] if len(host) > 4 else [None] * count,
        )

    def hand_on(self, other: ExitRule, seats: Sequence[int]) -> None:
        """Give the device that comes next what seats have of their tokens' vocabulary."""
        if self._prune_depth is None:
            return
        index = to_device(seats, torch.int64, self._device)
        kept, outside = self._kept_ids[index], self._outside[index]
        index = index.to(other._device)
        other._kept_ids[index] = kept.to(other._device)
        other._outside[index] = outside.to(other._device)

    def keep_drafts_with(self, last: ExitRule) -> None:
        """Leave what drafts are drawn from where they are judged."""
        self._sampler.keep_with(last._sampler)

    def _decide(self, depth: int, states: SegmentOutput, tokens: ScoredTokens) -> torch.Tensor:
        """Token ids, confidences, who leaves and whose scores are finite, [4, S] float64.

        Where the vocabulary was cut and the whole of it is chosen from again, also whose id had
        been kept, [5, S].
        """
        seats = to_device(tokens.seats, torch.int64, self._device)
        normed = self._head.normed_at(self._exit_layers[depth], states.hidden)
        scores, ids, outside = self._scores(depth, normed, seats)
        kind = self._exits.confidence
        found = summarise(scores, mean_log=kind == "entropy")
        num_outside = self._vocab_size - scores.shape[1]
        trust = confidence(kind, found, outside, num_outside, states)  # [B]
        finite = total_lse(found, outside).isfinite()
        if self._penalises:
            seen = self._seen_by(tokens, seats)
            seen = seen if ids is None else seen.gather(1, ids)
            scores = penalise(scores.float(), seen, self._sampling.repetition_penalty)
        if self._sampling.temperature > 0:
            is_last = depth == self._last
            token_ids = self._sampler.draw(scores.float(), ids, tokens, is_last=is_last)
        else:
            if self._penalises:
                best = first_argmax(scores)
            else:
                best = exact_best(normed, self._head.head_weight, scores, ids, found)
            token_ids = best if ids is None else ids.gather(1, best[:, None])[:, 0]
        leaves = trust > self._bars(depth, tokens.steps)
        columns = [token_ids, trust, leaves, finite]
        if ids is None and self._prune_depth is not None and depth > self._prune_depth:
            columns.append((self._kept_ids[seats] == token_ids[:, None]).any(dim=1))
        return torch.stack([column.double() for column in columns])

    def _scores(
        self, depth: int, normed: torch.Tensor, seats: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Scores [B, C], their ids [B, C] (None: the whole vocabulary) and the mass outside."""
        is_full_end = depth == self._last and self._exits.vocab.final_head == "full"
        if self._prune_depth is None or depth < self._prune_depth or is_full_end:
            return self._head.scores(normed), None, None
        if depth > self._prune_depth:
            ids = self._kept_ids[seats]
            return self._rescored(normed, ids), ids.long(), self._outside[seats]
        ids, scores, outside = self._pruned(normed)
        self._kept_ids[seats] = ids
        self._outside[seats] = outside
        return scores, ids.long(), outside

    def _pruned(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ids kept [B, K] int32, the head's scores of them, and the mass outside [B].

        Outside a shortlist no mass is known of; thresholds chosen with it take that into account.
        """
        proposal = self._proposal
        proposed = self._head.scores(normed) if proposal is None else proposal(normed)
        vocab, scores = prune(proposed, self._k, self._always_columns)
        ids = vocab.ids if self._column_ids is None else self._column_ids[vocab.ids]
        if proposal is not None and not proposal.is_exact:
            scores = self._rescored(normed, ids)
        return ids, scores, vocab.outside_lse

    def _rescored(self, normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The head's scores [B, K] of the ids [B, K]."""
        if self._gathers:
            return pruned_scores(normed, self._head.head_weight, ids)
        return self._head.scores(normed).gather(1, ids.long())

    def _seen_by(self, tokens: ScoredTokens, seats: torch.Tensor) -> torch.Tensor:
        """[S, V] bool, the ids up to each token; drafts are no part of what the seats keep."""
        seen = self._seen[seats]  # a copy
        pairs = [(row, i) for row, ids in enumerate(tokens.context_drafts) for i in ids]
        if pairs:
            rows, ids = to_device(pairs, torch.int64, self._device).T
            seen[rows, ids] = True
        return seen

    def _bars(self, depth: int, steps: Sequence[int]) -> torch.Tensor:
        """Threshold [S] float32 of each scored token."""
        if depth == self._last:
            return torch.zeros(len(steps), device=self._device)
        limit, decay = self._sampling.max_new_tokens, self._exits.decay
        bars = [decayed(self._thresholds[depth], step, limit, decay) for step in steps]
        return to_device(bars, torch.float32, self._device)
