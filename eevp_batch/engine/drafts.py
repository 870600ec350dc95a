"""Drawing tokens, some of them drafts: what those came from, and the full model's judgement.

Speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3 and appendix A.1; Chen et al.,
arXiv 2302.01318, algorithm 2): a draft x drawn from q stands with probability min(1, p(x) / q(x));
else the token is drawn from what p has more than q. Either way it is distributed as p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eevp_batch.engine.sampling import Choices, choices, draw, uniform
from eevp_batch.engine.sequence import ScoredTokens
from eevp_batch.engine.upload import to_device
from eevp_batch.spec import SamplingSpec


class Sampler:
    """Draws the scored tokens of a step; at the last exit it judges drafts instead.

    Args:
        sampling: its temperature is greater than 0, or nothing is ever drawn.
        max_resident: seats.
        max_drafts: most drafts of a seat that are to be judged; 0 where none ever are.
        num_choices: most tokens that a draft is drawn from.
        vocab_size: V.
        device: where scores are.
    """

    def __init__(
        self,
        sampling: SamplingSpec,
        max_resident: int,
        max_drafts: int,
        num_choices: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._sampling, self._vocab_size, self._device = sampling, vocab_size, device
        self._kept: DraftChoices | None = None
        if max_drafts and sampling.temperature > 0:
            self._kept = DraftChoices(max_resident, max_drafts, num_choices, device)

    def keep_with(self, other: Sampler) -> None:
        """Keep what drafts are drawn from where another sampler, on any device, looks for it."""
        self._kept = other._kept

    def draw(
        self,
        scores: torch.Tensor,
        ids: torch.Tensor | None,
        tokens: ScoredTokens,
        is_last: bool,
    ) -> torch.Tensor:
        """Ids [S] that the scored tokens would leave as.

        Args:
            scores: [S, C].
            ids: [S, C] of the scores; None: the whole vocabulary.
            tokens: seats, seeds, steps, and the drafts to judge.
            is_last: whether this is the last exit.
        """
        found = choices(scores, self._sampling)
        if ids is not None:
            found = Choices(found.probabilities, ids.gather(1, found.columns))
        uniforms = self._uniforms(tokens, range(len(scores)))
        drawn = found.columns.gather(1, draw(found.probabilities, uniforms)[:, None])[:, 0]
        if self._kept is None:
            return drawn
        if not is_last:
            # Nothing may be kept for one that stays by rule: another draft may have its place.
            rows = [row for row, may_leave in enumerate(tokens.may_leave) if may_leave]
            self._kept.store(*self._places(tokens, rows), self._part(found, rows))
            return drawn
        drafts = {row: draft for row, draft in enumerate(tokens.drafts) if draft is not None}
        if drafts:
            rows = list(drafts)
            drawn[to_device(rows, torch.int64, self._device)] = judge(
                full=self._part(found, rows),
                drafted=self._kept.load(*self._places(tokens, rows)),
                drafts=to_device(list(drafts.values()), torch.int64, self._device),
                accept_uniforms=self._uniforms(tokens, rows, "accept"),
                redraw_uniforms=self._uniforms(tokens, rows, "redraw"),
                vocab_size=self._vocab_size,
            )
        return drawn

    def _part(self, found: Choices, rows: Sequence[int]) -> Choices:
        """The choices of some scored tokens."""
        index = to_device(rows, torch.int64, self._device)
        return Choices(found.probabilities[index], found.columns[index])

    def _places(
        self, tokens: ScoredTokens, rows: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Seats and steps [len(rows)] of some scored tokens."""
        pairs = [(tokens.seats[row], tokens.steps[row]) for row in rows]
        seats, steps = to_device(pairs, torch.int64, self._device).view(-1, 2).T
        return seats, steps

    def _uniforms(
        self, tokens: ScoredTokens, rows: Sequence[int], purpose: str = ""
    ) -> torch.Tensor:
        """Their numbers [len(rows)] in [0, 1]."""
        numbers = [uniform(tokens.seeds[row], tokens.steps[row], purpose) for row in rows]
        return to_device(numbers, torch.float32, self._device)


class DraftChoices:
    """What every waiting draft was drawn from, by seat and number of the generated token.

    Args:
        max_resident: seats.
        max_waiting: most drafts of a seat at a time; they follow each other, so that their numbers
            modulo `max_waiting` differ.
        num_choices: C, most tokens that a draft is drawn from.
        device: where scores are.
    """

    def __init__(
        self, max_resident: int, max_waiting: int, num_choices: int, device: torch.device
    ) -> None:
        shape = (max_resident, max_waiting, num_choices)
        # Not zeros: memory that no draft needs is never touched.
        self._probabilities = torch.empty(shape, device=device)
        self._ids = torch.empty(shape, dtype=torch.int32, device=device)

    def store(self, seats: torch.Tensor, steps: torch.Tensor, found: Choices) -> None:
        """Keep the choices of a draft of each seat.

        Args:
            seats: [B], like the others on any device.
            steps: [B] numbers of the generated tokens.
            found: [B, C'] with C' <= C; their columns are ids.
        """
        width, device = found.columns.shape[1], self._ids.device
        seats, steps = seats.to(device), steps.to(device)
        slots = steps % self._ids.shape[1]
        self._ids[seats, slots, :width] = found.columns.int().to(device)
        self._probabilities[seats, slots, :width] = found.probabilities.to(device)
        self._ids[seats, slots, width:] = 0
        self._probabilities[seats, slots, width:] = 0.0

    def load(self, seats: torch.Tensor, steps: torch.Tensor) -> Choices:
        """The inverse of `store`; a row may be longer, by ids 0 of probability 0."""
        slots = steps % self._ids.shape[1]
        return Choices(self._probabilities[seats, slots], self._ids[seats, slots].long())


def judge(
    full: Choices,
    drafted: Choices,
    drafts: torch.Tensor,
    accept_uniforms: torch.Tensor,
    redraw_uniforms: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """The token that follows by the full model: the draft where it stands, else another.

    Args:
        full: [B, C] what the full model draws from; columns are ids.
        drafted: [B, C'] what the drafts were drawn from.
        drafts: [B] ids.
        accept_uniforms: [B] in [0, 1], they decide whether a draft stands.
        redraw_uniforms: [B] in [0, 1], they draw what replaces it.
        vocab_size: V.

    Returns:
        [B] ids; equal to the draft exactly where that stands.
    """
    p, q = _dense(full, vocab_size), _dense(drafted, vocab_size)
    p_draft, q_draft = (dense.gather(1, drafts[:, None])[:, 0] for dense in (p, q))
    residual = (p - q).clamp(min=0.0)
    # Where rounding rejects a draft of equal distributions nothing is left to draw from.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return torch.where(accept_uniforms * q_draft < p_draft, drafts, draw(residual, redraw_uniforms))


def _dense(found: Choices, vocab_size: int) -> torch.Tensor:
    """[B, V] probabilities."""
    dense = found.probabilities.new_zeros(len(found.columns), vocab_size)
    return dense.scatter_add_(1, found.columns, found.probabilities)
