"""Dynamic vocabulary pruning (arXiv 2410.18952): keep K ids per token, score only those later."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from eevp_batch.engine.invariance import fewest_rows
from eevp_batch.engine.native import kernels
from eevp_batch.engine.score_summary import BLOCK, ScoreSummary, summarise

SUB_BLOCK = 8
CONTENDERS = 4
"""Ids that are told apart where scores are rounded."""
GATHERED_BYTES = 2**20
"""Head rows gathered at a time: what stays in the cache until it is multiplied."""


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


def top_k(
    scores: torch.Tensor, k: int, blocks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each row and their columns, columns ascending.

    Exact: the k largest lie in the k blocks of columns with the largest maxima, so only those are
    searched. Which of several equal scores at the border is taken depends on the row alone.

    Args:
        scores: [B, V].
        k: 1 or more; all columns where k >= V.
        blocks: [B, ceil(V / BLOCK)] the maxima of a summary; found here where they are not given.

    Returns:
        values [B, min(k, V)] and columns [B, min(k, V)] int64.
    """
    rows, columns = scores.shape
    if k >= columns:
        return scores, torch.arange(columns, device=scores.device).expand(rows, columns)
    library = None if scores.is_cuda or scores.stride(1) != 1 else kernels(scores.dtype)
    if library is not None:
        picked = _found_natively(library, scores, k, blocks)
        return scores.gather(1, picked), picked
    if columns % BLOCK or k * SUB_BLOCK > columns // 2:
        picked = scores.topk(k, sorted=False).indices
    elif k * SUB_BLOCK > columns // BLOCK * 2:
        picked = _in_strided_blocks(scores, k)
    else:
        picked = _in_two_steps(scores, k, blocks)
    picked = picked.to(torch.int32).sort(-1).values.long()  # int32 sorts twice as fast
    return scores.gather(1, picked), picked


def _found_natively(
    library: ctypes.CDLL, scores: torch.Tensor, k: int, blocks: torch.Tensor | None
) -> torch.Tensor:
    """Columns [B, k] of the k largest, ascending; of equals at the border the first."""
    rows, columns = scores.shape
    blocks = summarise(scores).blocks if blocks is None else blocks
    ids = torch.empty(rows, k, dtype=torch.int32)
    pointers = (blocks.data_ptr(), k, ids.data_ptr())
    library.eevp_top_k(scores.data_ptr(), rows, columns, scores.stride(0), *pointers)
    return ids.long()


def _in_strided_blocks(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [B, k] of the k largest; a block is every (V / SUB_BLOCK)-th column.

    Maxima over far-apart columns are elementwise maxima of whole stretches, far cheaper than over
    a few neighbours.
    """
    rows, columns = scores.shape
    stretch = columns // SUB_BLOCK
    best = scores.view(rows, SUB_BLOCK, stretch).amax(1).topk(k, sorted=False).indices  # [B, k]
    starts = stretch * torch.arange(SUB_BLOCK, device=scores.device)
    return _best_of(scores, (best[:, :, None] + starts).view(rows, -1), k)


def _in_two_steps(scores: torch.Tensor, k: int, blocks: torch.Tensor | None) -> torch.Tensor:
    """Columns [B, k] of the k largest: the k best blocks, in them the k best parts, in them k."""
    rows = len(scores)
    blocked = scores.view(rows, -1, BLOCK)
    maxima = blocked.amax(-1) if blocks is None else blocks
    best = maxima.topk(min(k, maxima.shape[1]), sorted=False).indices  # [B, k]
    found = blocked.gather(1, best[:, :, None].expand(-1, -1, BLOCK))  # [B, k, BLOCK]
    parts = found.float().view(rows, -1, SUB_BLOCK).amax(-1).topk(k, sorted=False).indices
    per_block = BLOCK // SUB_BLOCK
    starts = best.gather(1, parts // per_block) * BLOCK + parts % per_block * SUB_BLOCK  # [B, k]
    inside = torch.arange(SUB_BLOCK, device=scores.device)
    return _best_of(scores, (starts[:, :, None] + inside).view(rows, -1), k)


def _best_of(scores: torch.Tensor, columns: torch.Tensor, k: int) -> torch.Tensor:
    """The k of the columns [B, C] that score most, [B, k]."""
    inner = scores.gather(1, columns).float().topk(k, sorted=False).indices
    return columns.gather(1, inner)


def prune(
    scores: torch.Tensor, k: int, always: torch.Tensor, summary: ScoreSummary | None = None
) -> tuple[PrunedVocab, torch.Tensor]:
    """Keep the k best ids of each row, those of `always` among them.

    Args:
        scores: [B, V] of any float type; changed and restored while this runs.
        k: ids to keep, at least len(always).
        always: [S] ids that are kept whatever they score: end and stop ids.
        summary: of the scores; made here where it is not given.

    Returns:
        The pruned vocabulary and the scores [B, k] float32 of its ids.
    """
    summary = summary or summarise(scores)
    saved, blocks = scores[:, always], summary.blocks.clone()
    scores[:, always] = torch.inf
    blocks[:, always // BLOCK] = torch.inf
    ids = top_k(scores, k, blocks)[1]
    scores[:, always] = saved
    kept = scores.gather(1, ids).float()
    if k >= scores.shape[1]:
        outside = torch.full_like(kept[:, 0], -torch.inf)
    else:
        outside = _log_difference(summary.lse, kept.logsumexp(-1))
    return PrunedVocab(ids.to(torch.int32), outside), kept


def _log_difference(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """log(exp(whole) - exp(part)), -inf where rounding leaves nothing.

    The error is about 1e-7 of the whole mass, far below what a confidence is compared with.
    """
    return whole + torch.log1p(-torch.exp((part - whole).clamp(max=0.0)))


def pruned_scores(normed: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Scores at the kept ids only: [B, E], [V, E], [B, K] int32 -> [B, K] float32.

    Rounded to the head's type, as its own product is. Without kernels the head rows are gathered
    for a few tokens at a time, so that they are multiplied while in the cache.
    """
    library = _kernels_for(weight)
    if library is not None:
        out = torch.empty(ids.shape, dtype=weight.dtype)
        states = normed.contiguous()
        pointers = [part.data_ptr() for part in (states, weight, ids.contiguous(), out)]
        library.eevp_gathered(*pointers, *ids.shape, weight.shape[1])
        return out.float()
    row_bytes = ids.shape[1] * weight.shape[1] * weight.element_size()
    step = len(ids) if weight.is_cuda else max(1, GATHERED_BYTES // row_bytes)
    parts = zip(torch.split(normed, step), torch.split(ids, step), strict=True)
    return torch.cat([_gathered_scores(part, weight, kept) for part, kept in parts]).float()


def exact_best(
    normed: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor | None,
    summary: ScoreSummary,
) -> torch.Tensor:
    """Columns [B] of the largest scores, told apart in float32 where `scores` are rounded.

    A bfloat16 score of 20 is known to a sixteenth, so that the first of several equal ones is often
    not the largest. Rounding keeps order: the largest is among those that look largest.

    Args:
        normed: [B, E].
        weight: [V, E].
        scores: [B, C], their product at the ids, rounded.
        ids: [B, C] of the scores; None: the whole vocabulary.
        summary: of the scores.
    """
    blocks, best = summary.blocks, summary.column
    if weight.dtype == torch.float32:
        return best
    tied = torch.arange(len(scores), device=scores.device)
    if not scores.is_cuda:  # there, asking which are tied would cost more than telling all apart
        tied = (summary.best == summary.second).nonzero()[:, 0]
        scores, blocks, normed = scores[tied], blocks[tied], normed[tied]
    if not len(tied):
        return best
    columns = top_k(scores, min(CONTENDERS, scores.shape[1]), blocks)[1]  # [B', CONTENDERS]
    rows = weight[columns if ids is None else ids[tied].gather(1, columns)].float()
    exact = (rows * normed[:, None].float()).sum(-1)
    return best.index_copy(0, tied, columns.gather(1, exact.argmax(-1, keepdim=True))[:, 0])


def gathers_natively(weight: torch.Tensor) -> bool:
    """Whether `pruned_scores` reads the head rows where they lie."""
    return _kernels_for(weight) is not None


def _kernels_for(weight: torch.Tensor) -> ctypes.CDLL | None:
    fits = not weight.is_cuda and weight.is_contiguous() and weight.shape[1] % 16 == 0
    return kernels(weight.dtype) if fits else None


def _gathered_scores(normed: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows, k = ids.shape
    missing = max(0, fewest_rows(k * normed.shape[1]) - rows)
    if missing:
        ids, normed = pad(ids, (0, 0, 0, missing)), pad(normed, (0, 0, 0, missing))
    kept = weight.index_select(0, ids.reshape(-1)).view(len(ids), k, -1)  # [B, K, E]
    return torch.bmm(kept, normed[:, :, None])[:rows, :, 0]
