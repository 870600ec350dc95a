"""Bridges: from the state that a token left with to the keys and values of the layers behind.

Ridge regression from unit states to what each layer's own projections make of the full-depth
states, for tokens of prompts and generated ones apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eevp_batch.engine.fitted import Bridge
from eevp_batch.tune.regression import (
    NormalEquations,
    Ridge,
    affine,
    choose_penalty,
    unexplained,
    variance,
)

LIFT = 1024
"""Features that bridges read besides a token's state and the one before; see `Bridge`."""


def lift_size(width: int) -> int:
    """R for a model of width E: at most 2 E."""
    return min(LIFT, 2 * width)


def usual_rank(width: int) -> int:
    """R at which a bridge with a lift costs no more than the layers' own projections."""
    return max(1, 2 * width // 3)


@dataclass(frozen=True, slots=True)
class BridgeFit:
    """A bridge and how good it is.

    Attributes:
        bridge: for the engine.
        penalty: regularisation, as a share of the mean variance of the inputs.
        unexplained: share of the held-out variance that it leaves, by layer.
        num_tokens: fitted to, and held out.
    """

    bridge: Bridge
    penalty: float
    unexplained: dict[int, float]
    num_tokens: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        layers = {str(layer): round(left, 5) for layer, left in self.unexplained.items()}
        return {
            "tokens": self.num_tokens[0],
            "held_out_tokens": self.num_tokens[1],
            "penalty": self.penalty,
            "unexplained_variance": layers,
        }


def fit_bridge(
    sums: NormalEquations,
    held_out: NormalEquations,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    lift: torch.Tensor | None = None,
) -> BridgeFit:
    """The bridge of one exit layer and one kind of token.

    Args:
        sums: of the tokens to fit to; one target per layer behind the exit.
        held_out: of other tokens; they choose the regularisation.
        rank: of the low-rank form; None, or at least the width of the inputs: full maps.
        dtype: of the weights.
        lift: that the inputs were made with; see `Bridge`.
    """
    ridge = Ridge(sums)
    penalty, down = choose_penalty(ridge, sums, held_out), None
    if rank is not None and rank < sums.width:
        down, maps = reduce_rank(ridge, penalty, sums, rank)
        held_out = held_out.through(down)
        down = down.to(dtype).contiguous()
    else:
        maps = {layer: next(ridge.maps(xy, [penalty])) for layer, xy in sums.xy.items()}
    left = {layer: unexplained(held_out, layer, weights) for layer, weights in maps.items()}
    layers = {layer: affine(weights, dtype) for layer, weights in maps.items()}
    return BridgeFit(Bridge(layers, down, lift), penalty, left, (sums.count, held_out.count))


def reduce_rank(
    ridge: Ridge, penalty: float, sums: NormalEquations, rank: int
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The best maps that all read the same few combinations of the inputs.

    Reduced-rank regression (Izenman 1975): with S the regularised covariance of the inputs, W the
    ridge solution and D one over each output's deviation, the maps of rank r nearest to W in
    ||S^{1/2} (W - W_r) D|| come from the leading left singular vectors U of S^{1/2} W D:
    W_r = S^{-1/2} U U^T S^{1/2} W. With S = A s A^T and C the covariance of inputs and outputs,
    S^{1/2} W = A s^{-1/2} A^T C, so that neither W nor a root of S is needed.

    Args:
        ridge: of the fitted rows.
        penalty: its regularisation.
        sums: the fitted rows.
        rank: r, 1 to E.

    Returns:
        down [r, E] and, by target, weights and bias behind it [r + 1, out], both float64.
    """
    root = ridge.spread(penalty).sqrt()[:, None]  # s^{1/2}
    rooted = {layer: ridge.rotated(xy) / root for layer, xy in sums.xy.items()}
    gram = torch.zeros_like(ridge.axes)
    for layer, values in rooted.items():
        scaled = values / variance(sums, layer).sqrt()
        gram += scaled @ scaled.T
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # A^T U: [E, r]
    down = (ridge.axes @ (leading / root)).T
    middle, maps = down @ ridge.mean, {}
    for layer, xy in sums.xy.items():
        up = leading.T @ rooted[layer]
        maps[layer] = torch.cat([up, (xy[-1] / sums.count - middle @ up)[None]])
    return down, maps
