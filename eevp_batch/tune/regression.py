"""Ridge regression from sums: rows are seen once, summed in float64, and can be seen anywhere.

What a fit needs of its rows is X^T X, X^T Y and Y^T Y. They add up, so that several replicas can
share the work, and so can the squared error on held-out rows be had from *their* sums, for any
number of regularisations and without a second look: ||Y - X W||^2 is a quadratic form in W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from eevp_batch.engine.fitted import Affine

PENALTIES = tuple(10.0**power for power in range(-8, 1))
"""Regularisations that are tried, as shares of the inputs' mean variance."""


def with_constant(rows: torch.Tensor) -> torch.Tensor:
    """[N, E] -> [N, E + 1] float64: a last column of ones, whose weights are the bias."""
    ones = torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
    return torch.cat([rows.double(), ones], 1)


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

    def add_inputs(self, inputs: torch.Tensor) -> None:
        """Count rows; each must come once to every target too.

        Args:
            inputs: [N, E + 1], what `with_constant` gave.
        """
        self.xx += inputs.T @ inputs

    def add_target(self, target: int, inputs: torch.Tensor, values: torch.Tensor) -> None:
        """Add the rows' values of one target.

        Args:
            target: its name.
            inputs: [N, E + 1], what `with_constant` gave.
            values: [N, out].
        """
        values = values.double()
        if target not in self.xy:
            shape = (len(self.xx), values.shape[1])
            self.xy[target] = torch.zeros(shape, dtype=torch.float64, device=self.xx.device)
            self.yy[target] = torch.zeros(shape[1], dtype=torch.float64, device=self.xx.device)
        self.xy[target] += inputs.T @ values
        self.yy[target] += values.square().sum(0)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.xx + other.xx, _sum(self.xy, other.xy), _sum(self.yy, other.yy))

    def save(self, path: Path) -> None:
        """Write the sums as safetensors."""
        tensors = {"xx": self.xx}
        for target in self.xy:
            tensors |= {f"xy.{target}": self.xy[target], f"yy.{target}": self.yy[target]}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> NormalEquations:
        """Read what `save` wrote."""
        tensors = load_file(path, device=device)
        found = cls(tensors.pop("xx"))
        for name, tensor in tensors.items():
            kind, target = name.split(".")
            (found.xy if kind == "xy" else found.yy)[int(target)] = tensor
        return found


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

    def map(self, target: int, penalty: float) -> torch.Tensor:
        """Weights and bias [E + 1, out] float64 of one target."""
        mean_y = self._sums.xy[target][-1] / self._sums.count
        if target not in self._rotated:
            cross = self._sums.xy[target][:-1] / self._sums.count - self.mean.outer(mean_y)
            self._rotated[target] = self.axes.T @ cross
        weight = self.axes @ (self._rotated[target] / self.spread(penalty)[:, None])
        return torch.cat([weight, (mean_y - self.mean @ weight)[None]])


def squared_error(sums: NormalEquations, target: int, weights: torch.Tensor) -> torch.Tensor:
    """Mean squared error [out] of a map [E + 1, out] over the rows of `sums`."""
    cross = 2 * (weights * sums.xy[target]).sum(0)
    square = (weights * (sums.xx @ weights)).sum(0)
    return (sums.yy[target] - cross + square) / sums.count


def variance(sums: NormalEquations, target: int) -> torch.Tensor:
    """Variance [out] of a target over the rows of `sums`, above zero."""
    square, mean = sums.yy[target] / sums.count, sums.xy[target][-1] / sums.count
    # Below rounding an output is constant, and to divide by its noise would only amplify it.
    return torch.maximum(square - mean.square(), 1e-9 * square).clamp(min=1e-30)


def unexplained(sums: NormalEquations, target: int, weights: torch.Tensor) -> float:
    """Share of a target's variance that a map leaves, mean over its outputs."""
    shares = squared_error(sums, target, weights) / variance(sums, target)
    return float(shares.clamp(min=0.0).mean())


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """The chosen regularisation and what it gives.

    Attributes:
        penalty: the chosen one.
        maps: [E + 1, out] by target.
        unexplained: share of the held-out variance that is left, by target.
        tried: the mean of that over the targets, by penalty.
    """

    penalty: float
    maps: Mapping[int, torch.Tensor]
    unexplained: Mapping[int, float]
    tried: Mapping[float, float]


def fit_ridge(
    ridge: Ridge,
    held_out: NormalEquations,
    targets: Iterable[int],
    penalties: Sequence[float] = PENALTIES,
) -> RidgeFit:
    """Fit all targets with the one regularisation that leaves least on held-out rows."""
    targets = list(targets)
    tried: dict[float, float] = {}
    best: RidgeFit | None = None
    for penalty in penalties:
        maps = {target: ridge.map(target, penalty) for target in targets}
        left = {target: unexplained(held_out, target, maps[target]) for target in targets}
        tried[penalty] = sum(left.values()) / len(left)
        if best is None or tried[penalty] < tried[best.penalty]:
            best = RidgeFit(penalty, maps, left, tried)
    if best is None:
        raise ValueError("no penalty to try")
    return best


def affine(weights: torch.Tensor, dtype: torch.dtype) -> Affine:
    """A map [E + 1, out] as an `Affine`."""
    return Affine(weights[:-1].T.to(dtype).contiguous(), weights[-1].to(dtype))
