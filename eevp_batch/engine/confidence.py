"""How sure an exit is of its best token, from a summary of the scores there."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cosine_similarity

from eevp_batch.engine.score_summary import ScoreSummary
from eevp_batch.engine.segmented_model import SegmentOutput


def confidence(
    kind: str,
    found: ScoreSummary,
    outside_lse: torch.Tensor | None,
    num_outside: int,
    states: SegmentOutput,
) -> torch.Tensor:
    """Confidence [B] float32 of the model in its best token.

    Probabilities are over the whole vocabulary: a pruned softmax alone would overstate them, so the
    mass outside, known from where the vocabulary was cut, is folded back in.

    Args:
        kind: `margin` (arXiv 2410.18952, section 3), `max_prob`, `entropy` (1 - H / log V, the mass
            outside taken as spread evenly; `found` needs `mean_log`) or `hidden_cosine` (CALM,
            section 3.4: cosine of the states before and after the exit layer).
        found: of the scores of the whole vocabulary or of the kept ids.
        outside_lse: [B], or None when nothing is outside.
        num_outside: ids that are not kept.
        states: before and after the exit layer.
    """
    if kind == "hidden_cosine":
        return cosine_similarity(states.hidden.float(), states.before.float(), dim=-1)
    total = total_lse(found, outside_lse)
    if kind == "entropy":
        num_kept = found.num_columns
        entropy = _entropy(found, total, outside_lse, num_outside)
        return 1.0 - entropy / math.log(num_kept + num_outside)
    best = (found.best - total).exp()
    return best if kind == "max_prob" else best - (found.second - total).exp()


def total_lse(found: ScoreSummary, outside_lse: torch.Tensor | None) -> torch.Tensor:
    """Log-sum-exp [B] of all scores, those outside the kept ids included."""
    return found.lse if outside_lse is None else torch.logaddexp(found.lse, outside_lse)


def _entropy(
    found: ScoreSummary, total: torch.Tensor, outside_lse: torch.Tensor | None, num_outside: int
) -> torch.Tensor:
    """H [B] in nats."""
    if found.mean_log is None:
        raise ValueError("entropy needs a summary made with mean_log=True")
    log_inside = found.lse - total  # the log of the kept ids' share
    entropy = -log_inside.exp() * (found.mean_log + log_inside)
    if outside_lse is None or not num_outside:
        return entropy
    log_outside = outside_lse - total
    spread = log_outside.exp() * (log_outside - math.log(num_outside))
    return entropy - torch.where(log_outside.isinf(), 0.0, spread)
