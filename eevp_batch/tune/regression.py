"""Ridge regression from sums: rows are seen once, and can be seen anywhere.

What a fit needs of its rows is X^T X, X^T Y and Y^T Y. They add up, so that several replicas can
share the work, and so can the squared error on held-out rows be had from *their* sums, for any
number of regularisations and without a second look: ||Y - X W||^2 is a quadratic form in W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eevp_batch.engine.fitted import Affine

PENALTIES = tuple(10.0**power for power in range(-8, 1))
"""Regularisations that are tried, as shares of the inputs' mean variance."""
PROBED_OUTPUTS = 512
"""Of all targets together, evenly spread: the outputs that choose the regularisation."""
FLOAT32_ROWS = 32_768
"""Rows that are summed in float32 before the sums go into float64."""
_PROBE = 0


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

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.xx + other.xx, _sum(self.xy, other.xy), _sum(self.yy, other.yy))

    def through(self, down: torch.Tensor) -> NormalEquations:
        """The sums of the same rows where inputs are mapped by `down` [r, E] float64."""
        whole = torch.nn.functional.pad(down, (0, 1, 0, 1))
        whole[-1, -1] = 1.0
        xy = {target: whole @ sums for target, sums in self.xy.items()}
        return NormalEquations(whole @ self.xx @ whole.T, xy, self.yy)

    def probed(self) -> NormalEquations:
        """The sums of a sample of all outputs, as one target."""
        every = max(1, sum(len(squares) for squares in self.yy.values()) // PROBED_OUTPUTS)
        xy = torch.cat([sums[:, ::every] for sums in self.xy.values()], 1)
        yy = torch.cat([squares[::every] for squares in self.yy.values()])
        return NormalEquations(self.xx, {_PROBE: xy}, {_PROBE: yy})


def _sum(
    ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    both = dict(ours)
    for target, value in theirs.items():
        both[target] = both[target] + value if target in both else value
    return both


class RowSums:
    """Adds rows up, at the speed of float32 and with little of its error.

    Rows are summed less a point near their mean, so that a large mean costs no digits, in float32
    and every `FLOAT32_ROWS` rows in float64.

    Args:
        width: E.
        device: of the sums.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._total = NormalEquations.empty(width, device)
        self._point: torch.Tensor | None = None  # [E + 1] float64
        self._points: dict[int, torch.Tensor] = {}  # by target, [out] float64
        self._xx = torch.zeros(width + 1, width + 1, device=device)
        self._xy: dict[int, torch.Tensor] = {}
        self._yy: dict[int, torch.Tensor] = {}

    def block(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, E] ready to be added: [N, E + 1] float32."""
        if self._point is None:
            self._point = torch.cat([rows.double().sum(0) / max(1, len(rows)), rows.new_zeros(1)])
        columns = torch.nn.functional.pad(rows.double(), (0, 1), value=1.0) - self._point
        return columns.float()

    def add_inputs(self, block: torch.Tensor) -> None:
        """Count the rows of a block; each must come once to every target too."""
        if float(self._xx[-1, -1]) >= FLOAT32_ROWS:
            self._settle()
        self._xx.addmm_(block.T, block)

    def add_target(self, target: int, block: torch.Tensor, values: torch.Tensor) -> None:
        """Add the values [N, out] of one target for the rows of a block."""
        if target not in self._points:
            self._points[target] = values.double().sum(0) / max(1, len(values))
        if target not in self._xy:
            self._xy[target] = block.new_zeros(block.shape[1], values.shape[1])
            self._yy[target] = torch.zeros_like(self._points[target])
        centred = values.double() - self._points[target]
        self._xy[target].addmm_(block.T, centred.float())
        self._yy[target] += centred.square().sum(0)

    def total(self) -> NormalEquations:
        """The sums of all rows so far."""
        self._settle()
        return self._total

    def _settle(self) -> None:
        """Move what was summed in float32 into the total, back from the points."""
        if self._point is None:
            return
        back = torch.eye(len(self._xx), dtype=torch.float64, device=self._xx.device)
        back[-1] += self._point  # [X | 1] = [X - point | 1] @ back
        xx, xy, yy = self._xx.double(), {}, {}
        for target, point in self._points.items():
            moved = self._xy.pop(target).double()
            yy[target] = self._yy.pop(target) + point * (2 * moved[-1] + point * xx[-1, -1])
            moved += torch.outer(xx[:, -1], point)
            moved += torch.outer(self._point, moved[-1])
            xy[target] = moved
        self._total += NormalEquations(back.T @ xx @ back, xy, yy)
        self._xx.zero_()


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
        self._count = sums.count
        self.mean = sums.xx[-1, :-1] / sums.count  # [E]
        covariance = sums.xx[:-1, :-1] / sums.count - self.mean.outer(self.mean)
        self._variances, self.axes = torch.linalg.eigh(covariance)
        self._variances = self._variances.clamp(min=0.0)
        self._scale = float(self._variances.mean().clamp(min=1e-30))

    def spread(self, penalty: float) -> torch.Tensor:
        """Regularised variances [E] of the inputs along `axes`."""
        spread: torch.Tensor = self._variances + penalty * self._scale
        return spread

    def rotated(self, xy: torch.Tensor) -> torch.Tensor:
        """Covariance [E, out] of the inputs along `axes` and a target, of sums [E + 1, out]."""
        covariance = xy[:-1] / self._count - self.mean.outer(xy[-1] / self._count)
        rotated: torch.Tensor = self.axes.T @ covariance
        return rotated

    def maps(self, xy: torch.Tensor, penalties: Iterable[float]) -> Iterator[torch.Tensor]:
        """Weights and bias [E + 1, out] float64 of a target, for each regularisation."""
        rotated, mean_y = self.rotated(xy), xy[-1] / self._count
        for penalty in penalties:
            weight = self.axes @ (rotated / self.spread(penalty)[:, None])
            yield torch.cat([weight, (mean_y - self.mean @ weight)[None]])


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


def choose_penalty(
    ridge: Ridge,
    sums: NormalEquations,
    held_out: NormalEquations,
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """The regularisation that leaves least of all targets on held-out rows.

    Which one it is, a sample of the outputs tells: to try all of them costs more than the rest.

    Raises:
        ValueError: no penalties.
    """
    judge = held_out.probed()
    maps = ridge.maps(sums.probed().xy[_PROBE], penalties)
    left = {
        penalty: unexplained(judge, _PROBE, weights)
        for penalty, weights in zip(penalties, maps, strict=True)
    }
    return min(left, key=lambda penalty: left[penalty])


def fit_ridge(
    sums: NormalEquations, held_out: NormalEquations, penalties: Sequence[float] = PENALTIES
) -> dict[int, torch.Tensor]:
    """Weights and bias [E + 1, out] float64 of all targets, with one regularisation.

    Args:
        sums: the rows to fit to, one or more.
        held_out: rows that choose the regularisation.
        penalties: to choose from.
    """
    ridge = Ridge(sums)
    penalty = choose_penalty(ridge, sums, held_out, penalties)
    return {target: next(ridge.maps(xy, [penalty])) for target, xy in sums.xy.items()}


def affine(weights: torch.Tensor, dtype: torch.dtype) -> Affine:
    """A map [E + 1, out] as an `Affine`."""
    return Affine(weights[:-1].T.to(dtype).contiguous(), weights[-1].to(dtype))
