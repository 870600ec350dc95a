"""Choosing a token from scores: greedy, or sampled by a number that belongs to the row.

A sampled token depends on (job seed, row id, sample index, position) and the scores, on nothing
else: no generator state exists that batch mates, a retry or another replica could have moved.
"""

from __future__ import annotations

from hashlib import blake2b

import torch

from eevp_batch.engine.score_summary import first_argmax
from eevp_batch.records import RowId
from eevp_batch.spec import SamplingSpec


def generation_seed(job_seed: int, row_id: RowId, sample_index: int) -> int:
    """64-bit seed of one generation; integer and string ids never meet."""
    key = f"{job_seed}/{type(row_id).__name__}/{sample_index}/{row_id}"
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws the token at `position` of the generation."""
    key = seed.to_bytes(8) + position.to_bytes(8)
    return int.from_bytes(blake2b(key, digest_size=8).digest()) / 2.0**64


def penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858, section 4.1) as transformers applies it.

    Args:
        scores: [B, C].
        seen: [B, C] bool, whether the prompt or the generation so far contains the id.
        penalty: positive scores are divided by it, negative ones multiplied.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(scores: torch.Tensor, uniforms: torch.Tensor, sampling: SamplingSpec) -> torch.Tensor:
    """Column of the chosen token in each row.

    The temperature is applied first, then top-k, then top-p over what is left, as transformers
    does; then the inverse of the cumulative distribution is taken at the row's number.

    Args:
        scores: [B, C] float32.
        uniforms: [B] float32 in [0, 1).
        sampling: temperature 0 takes the first largest score.

    Returns:
        [B] int64.
    """
    if sampling.temperature == 0:
        return first_argmax(scores)
    scaled = scores / sampling.temperature
    probabilities, columns = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities = probabilities[:, : sampling.top_k]
        columns = columns[:, : sampling.top_k]
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    below = probabilities.cumsum(-1) - probabilities
    # Keeps the smallest set whose mass reaches top_p; the first one always.
    probabilities = probabilities * ((below < sampling.top_p) | (below <= 0))
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return columns.gather(1, drawn.minimum(last))[:, 0]
