"""Dynamic vocabulary pruning (arXiv 2410.18952): keep K ids per token, score only those later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from eevp_batch.engine.invariance import fewest_rows

BLOCK = 32
MAX_BLOCK_K = 256
"""Above this many, searching the blocks costs more than `topk` over the whole row."""


@dataclass(frozen=True, slots=True)
class PrunedVocab:
    """The ids that a token may still become.

    Attributes:
        ids: [B, K] int32, ascending in each row.
        outside_lse: [B] float32, log-sum-exp of the scores outside `ids` where the vocabulary was
            cut; -inf when nothing was cut.
    """

    ids: torch.Tensor
    outside_lse: torch.Tensor


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each row and their columns, columns ascending.

    Exact, in two stages for small k: the k largest scores lie in the k blocks of `BLOCK` columns
    with the largest maxima, so one cheap pass finds the blocks and only those are searched.

    Args:
        scores: [B, V].
        k: 1 or more; all columns where k >= V.

    Returns:
        values [B, min(k, V)] and columns [B, min(k, V)] int64.
    """
    rows, columns = scores.shape
    if k >= columns:
        return scores, torch.arange(columns, device=scores.device).expand(rows, columns)
    if columns % BLOCK or k > min(MAX_BLOCK_K, columns // BLOCK):
        picked = scores.topk(k, sorted=False).indices
    else:
        blocked = scores.view(rows, -1, BLOCK)
        blocks = blocked.amax(-1).topk(k, sorted=False).indices  # [B, k]
        found = blocked.gather(1, blocks[:, :, None].expand(rows, k, BLOCK)).view(rows, -1)
        inner = found.topk(k, sorted=False).indices  # [B, k] in 0..k*BLOCK-1
        picked = blocks.gather(1, inner // BLOCK) * BLOCK + inner % BLOCK
    picked = picked.sort(-1).values
    return scores.gather(1, picked), picked


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """The first column of each row's largest score, [B, V] -> [B]; `argmax` in blocks."""
    rows, columns = scores.shape
    if columns % BLOCK:
        return scores.argmax(-1)
    blocked = scores.view(rows, -1, BLOCK)
    block = blocked.amax(-1).argmax(-1)  # [B]
    inside = blocked[torch.arange(rows, device=scores.device), block].argmax(-1)
    return block * BLOCK + inside


def prune(scores: torch.Tensor, k: int, always: torch.Tensor) -> tuple[PrunedVocab, torch.Tensor]:
    """Keep the k best ids of each row, those of `always` among them.

    Args:
        scores: [B, V] float32; changed and restored while this runs.
        k: ids to keep, at least len(always).
        always: [S] ids that are kept whatever they score: end and stop ids.

    Returns:
        The pruned vocabulary and the scores [B, k] of its ids.
    """
    saved = scores[:, always]
    scores[:, always] = torch.inf
    ids = top_k(scores, k)[1]
    scores[:, always] = saved
    kept = scores.gather(1, ids)
    if k >= scores.shape[1]:
        outside = torch.full_like(kept[:, 0], -torch.inf)
    else:
        outside = _log_difference(scores.logsumexp(-1), kept.logsumexp(-1))
    return PrunedVocab(ids.to(torch.int32), outside), kept


def _log_difference(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """log(exp(whole) - exp(part)), -inf where rounding leaves nothing.

    The error is about 1e-7 of the whole mass, far below what a confidence is compared with.
    """
    return whole + torch.log1p(-torch.exp((part - whole).clamp(max=0.0)))


def pruned_scores(normed: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Scores at the kept ids only: [B, E], [V, E], [B, K] -> [B, K] float32."""
    rows, k = ids.shape
    missing = max(0, fewest_rows(k * normed.shape[1]) - rows)
    if missing:
        ids, normed = pad(ids, (0, 0, 0, missing)), pad(normed, (0, 0, 0, missing))
    kept = weight.index_select(0, ids.reshape(-1)).view(len(ids), k, -1)  # [B, K, E]
    return torch.bmm(kept, normed[:, :, None])[:rows, :, 0].float()
