"""Sampled drafts: what they were drawn from, and the judgement of the full model on them.

Speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3 and appendix A.1; Chen et al.,
arXiv 2302.01318, algorithm 2): a draft x drawn from q stands with probability min(1, p(x) / q(x));
else the token is drawn from what p has more than q. Either way it is distributed as p.
"""

from __future__ import annotations

import torch

from eevp_batch.engine.sampling import Choices, draw


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
            seats: [B].
            steps: [B] numbers of the generated tokens.
            found: [B, C'] with C' <= C; their columns are ids.
        """
        width = found.columns.shape[1]
        slots = steps % self._ids.shape[1]
        self._ids[seats, slots, :width] = found.columns.int()
        self._probabilities[seats, slots, :width] = found.probabilities
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
