"""Choosing a token from scores: greedy, or sampled by a number that belongs to the row.

A sampled token depends on (job seed, row id, sample index, position) and the scores, on nothing
else: no generator state exists that batch mates, a retry or another replica could have moved.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import torch

from eevp_batch.records import RowId
from eevp_batch.spec import SamplingSpec


def generation_seed(job_seed: int, row_id: RowId, sample_index: int) -> int:
    """64-bit seed of one generation; integer and string ids never meet."""
    key = f"{job_seed}/{type(row_id).__name__}/{sample_index}/{row_id}"
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Choices(NamedTuple):
    """What a token may be drawn from.

    Attributes:
        probabilities: [B, C] float32, each row sums to 1.
        columns: [B, C] int64, which column of the scores each probability belongs to.
    """

    probabilities: torch.Tensor
    columns: torch.Tensor


def uniform(seed: int, position: int, purpose: str = "") -> float:
    """A number in [0, 1) for the token at `position` of the generation.

    Args:
        seed: of the generation.
        position: counts generated tokens from 0 on.
        purpose: empty for drawing the token; each other purpose has numbers of its own.
    """
    key = seed.to_bytes(8) + position.to_bytes(8) + purpose.encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest()) / 2.0**64


def penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858, section 4.1) as transformers applies it.

    Args:
        scores: [B, C].
        seen: [B, C] bool, whether the prompt or the generation so far contains the id.
        penalty: positive scores are divided by it, negative ones multiplied.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choices(scores: torch.Tensor, sampling: SamplingSpec) -> Choices:
    """What a sampled token is drawn from, likeliest first.

    The temperature is applied first, then top-k, then top-p over what is left, as transformers
    does.

    Args:
        scores: [B, C] float32.
        sampling: its temperature is greater than 0.
    """
    scaled = scores / sampling.temperature
    probabilities, columns = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities = probabilities[:, : sampling.top_k]
        columns = columns[:, : sampling.top_k]
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    below = probabilities.cumsum(-1) - probabilities
    # Keeps the smallest set whose mass reaches top_p; the first one always.
    probabilities = probabilities * ((below < sampling.top_p) | (below <= 0))
    return Choices(probabilities / probabilities.sum(-1, keepdim=True), columns)


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The inverse of the cumulative distribution at the row's number: [B, C], [B] -> [B].

    Args:
        weights: float32, at least one of each row positive; they need not sum to 1.
        uniforms: float32 in [0, 1], for a number just below 1 is rounded to it.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = (uniforms[:, None] * total).minimum(below_total)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
