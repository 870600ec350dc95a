"""Ridge regression from sums: rows are seen once, summed in float64, and can be seen anywhere.

Each block of rows is centred on its own mean and multiplied in float32, the rest is exact, and
blocks are added in float64: a large mean costs no digits, and products have the speed of float32.

What a fit needs of its rows is X^T X, X^T Y and Y^T Y. They add up, so that several replicas can
share the work, and so can the squared error on held-out rows be had from *their* sums, for any
number of regularisations and without a second look: ||Y - X W||^2 is a quadratic form in W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eevp_batch.engine.fitted import Affine

PENALTIES = tuple(10.0**power for power in range(-8, 1))
"""Regularisations that are tried, as shares of the inputs' mean variance."""


PROBED_OUTPUTS = 512
"""Of all targets together, evenly spread: the outputs that choose the regularisation."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of inputs, ready to be summed.

    Attributes:
        centred: [N, E] float32, less their mean.
        mean: [E] float64; zero where there are no rows.
    """

    centred: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Block:
        """Of rows [N, E], N of a few thousand at most, so that float32 products are good enough."""
        mean = rows.double().sum(0) / max(1, len(rows))
        return cls((rows - mean).float(), mean)


@dataclass(slots=True)
class NormalEquations:
    """Sums over rows of one input and any number of targets of that input.

    Attributes:
        xx: [E + 1, E + 1] float64; its last entry counts the rows.
        xy: [E + 1, out] by target.
        yy: [out] squares by target.
    """

    xx: torch.Tensor
    xy: dict[int, torch.Tensor] = field(default_factory=dict)
    yy: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> NormalEquations:
        """No rows yet of `width` inputs."""
        size = width + 1
        return cls(torch.zeros(size, size, dtype=torch.float64, device=device))

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.xx[-1, -1])

    @property
    def width(self) -> int:
        """E."""
        return len(self.xx) - 1

    def add_inputs(self, block: Block) -> None:
        """Count rows [N, E]; each must come once to every target too."""
        count, mean = len(block.centred), block.mean
        self.xx[:-1, :-1] += (block.centred.T @ block.centred).double()
        self.xx += count * torch.outer(with_one(mean), with_one(mean))

    def add_target(self, target: int, block: Block, values: torch.Tensor) -> None:
        """Add the rows' values of one target.

        Args:
            target: its name.
            block: the rows [N, E].
            values: [N, out].
        """
        if target not in self.xy:
            shape = (len(self.xx), values.shape[1])
            self.xy[target] = torch.zeros(shape, dtype=torch.float64, device=self.xx.device)
            self.yy[target] = torch.zeros(shape[1], dtype=torch.float64, device=self.xx.device)
        total = values.double().sum(0)
        centred = values - total / max(1, len(values))
        self.xy[target][:-1] += (block.centred.T @ centred.float()).double()
        self.xy[target] += torch.outer(with_one(block.mean), total)
        self.yy[target] += values.double().square().sum(0)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.xx + other.xx, _sum(self.xy, other.xy), _sum(self.yy, other.yy))


def with_one(mean: torch.Tensor) -> torch.Tensor:
    """[E] -> [E + 1]: the constant behind it, whose weights are the bias."""
    return torch.cat([mean, mean.new_ones(1)])


def _sum(
    ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    both = dict(ours)
    for target, value in theirs.items():
        both[target] = both[target] + value if target in both else value
    return both


class Ridge:
    """The affine maps of all targets for any regularisation, from one decomposition of X^T X.

    Minimises ||Y - X W - b||^2 + n penalty v ||W||^2, v the mean variance of an input; the bias is
    not regularised.

    Args:
        sums: the rows to fit to, one or more.

    Attributes:
        mean: [E] of the inputs.
        axes: [E, E] their principal directions, as columns.
    """

    def __init__(self, sums: NormalEquations) -> None:
        self._sums = sums
        self.mean = sums.xx[-1, :-1] / sums.count  # [E]
        covariance = sums.xx[:-1, :-1] / sums.count - self.mean.outer(self.mean)
        self._variances, self.axes = torch.linalg.eigh(covariance)
        self._variances = self._variances.clamp(min=0.0)
        self._scale = float(self._variances.mean().clamp(min=1e-30))
        self._rotated: dict[int, torch.Tensor] = {}

    def spread(self, penalty: float) -> torch.Tensor:
        """Regularised variances [E] of the inputs along `axes`."""
        spread: torch.Tensor = self._variances + penalty * self._scale
        return spread

    def map(self, target: int, penalty: float, outputs: slice = slice(None)) -> torch.Tensor:
        """Weights and bias [E + 1, out] float64 of one target, or of some of its outputs."""
        if target not in self._rotated:
            mean_y = self._sums.xy[target][-1] / self._sums.count
            cross = self._sums.xy[target][:-1] / self._sums.count - self.mean.outer(mean_y)
            self._rotated[target] = self.axes.T @ cross
        rotated = self._rotated[target][:, outputs]
        weight = self.axes @ (rotated / self.spread(penalty)[:, None])
        mean_y = self._sums.xy[target][-1, outputs] / self._sums.count
        return torch.cat([weight, (mean_y - self.mean @ weight)[None]])


def squared_error(
    sums: NormalEquations, target: int, weights: torch.Tensor, outputs: slice = slice(None)
) -> torch.Tensor:
    """Mean squared error [out] of a map [E + 1, out] over the rows of `sums`."""
    cross = 2 * (weights * sums.xy[target][:, outputs]).sum(0)
    square = (weights * (sums.xx @ weights)).sum(0)
    return (sums.yy[target][outputs] - cross + square) / sums.count


def variance(sums: NormalEquations, target: int) -> torch.Tensor:
    """Variance [out] of a target over the rows of `sums`, above zero."""
    square, mean = sums.yy[target] / sums.count, sums.xy[target][-1] / sums.count
    # Below rounding an output is constant, and to divide by its noise would only amplify it.
    return torch.maximum(square - mean.square(), 1e-9 * square).clamp(min=1e-30)


def unexplained(
    sums: NormalEquations, target: int, weights: torch.Tensor, outputs: slice = slice(None)
) -> float:
    """Share of a target's variance that a map leaves, mean over its outputs.

    Args:
        sums: of the rows that judge.
        target: its name.
        weights: [E + 1, out], the map.
        outputs: which of the target's outputs the map gives.
    """
    shares = squared_error(sums, target, weights, outputs) / variance(sums, target)[outputs]
    return float(shares.clamp(min=0.0).mean())


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """The chosen regularisation and what it gives.

    Attributes:
        penalty: the chosen one.
        maps: [E + 1, out] by target.
        tried: share of the held-out variance that is left, mean over the probed outputs of all
            targets, by penalty.
    """

    penalty: float
    maps: Mapping[int, torch.Tensor]
    tried: Mapping[float, float]


def fit_ridge(
    ridge: Ridge,
    held_out: NormalEquations,
    targets: Iterable[int],
    penalties: Sequence[float] = PENALTIES,
) -> RidgeFit:
    """Fit all targets with the one regularisation that leaves least on held-out rows.

    Which one it is, a sample of the outputs tells: to try all of them costs more than the rest.

    Raises:
        ValueError: no penalties.
    """
    targets = list(targets)
    probed = slice(
        None, None, max(1, sum(held_out.xy[t].shape[1] for t in targets) // PROBED_OUTPUTS)
    )
    tried = {}
    for penalty in penalties:
        left = [
            unexplained(held_out, target, ridge.map(target, penalty, probed), probed)
            for target in targets
        ]
        tried[penalty] = sum(left) / len(left)
    best = min(tried, key=lambda penalty: tried[penalty])
    return RidgeFit(best, {target: ridge.map(target, best) for target in targets}, tried)


def affine(weights: torch.Tensor, dtype: torch.dtype) -> Affine:
    """A map [E + 1, out] as an `Affine`."""
    return Affine(weights[:-1].T.to(dtype).contiguous(), weights[-1].to(dtype))
