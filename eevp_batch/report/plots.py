"""The geometry of the report's charts: where things stand, in thousandths of the plot's sides.

The page's template draws them as SVG that stretches with the page; axes and legends are text beside
it, so that they stay readable on a narrow screen. Colours are classes: the page has two themes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eevp_batch.report.text import duration, number, percent

SIDE = 1000.0
MAX_COLUMNS = 40


class Tick(NamedTuple):
    """A label and its place, 0..100 % from the left or the bottom."""

    place: float
    label: str


class Rect(NamedTuple):
    """A rectangle; `colour` is a class, `tip` what is told of it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str


class Dot(NamedTuple):
    """A point with the interval (top and bottom) that it stands in."""

    x: float
    y: float
    top: float
    bottom: float
    colour: str
    tip: str


@dataclass
class Plot:
    """A chart.

    Attributes:
        label: what it shows, for who cannot see it.
        lines, areas: (colour, SVG path).
        legend: (colour, name).
        head, rows: the same as a table.
    """

    label: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rects: list[Rect] = field(default_factory=list)
    areas: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def steps(high: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `high`, about `count` steps."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [step * k for k in range(math.ceil(high / step - 1e-9) + 1)]


def time_ticks(end_s: float) -> list[Tick]:
    """Ticks of an axis of seconds, at times that people count in."""
    sizes = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200)
    step = next((s for s in sizes if s * 5 >= end_s), 86400 * math.ceil(end_s / 86400 / 5))
    size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if step % s == 0)
    return [Tick(100 * t / end_s, f"{t // size} {unit}") for t in range(0, int(end_s) + 1, step)]


def step_plot(
    label: str, y_label: str, points: Sequence[tuple[float, float]], end_s: float
) -> Plot:
    """Amounts over seconds of running, each holding until the next, with the area below filled.

    Args:
        label: what it shows.
        y_label: unit.
        points: (seconds, amount), increasing in time, from 0 to `end_s`.
        end_s: where the axis ends.
    """
    ticks = steps(max(y for _, y in points))
    places = [(SIDE * x / end_s, SIDE * (1 - y / ticks[-1])) for x, y in points]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    area = f"{path}V{SIDE:.0f}H{places[0][0]:.1f}Z"
    thinned = points[:: max(1, len(points) // 24)]
    return Plot(
        label=label,
        x_label="time of running",
        y_label=y_label,
        x_ticks=time_ticks(end_s),
        y_ticks=_amounts(ticks),
        areas=[("accent", area)],
        lines=[("accent", path)],
        head=["time of running", y_label],
        rows=[[duration(x), number(y)] for x, y in thinned],
    )


def stacked_plot(
    label: str,
    x_label: str,
    counts: npt.NDArray[np.int64],
    names: Sequence[str],
    colours: Sequence[str],
) -> Plot:
    """Shares by position, as columns that fill the whole height.

    Args:
        label: what it shows.
        x_label: what positions are.
        counts: [positions, names], from position 0; neighbours are joined where there are many.
        names: of the second axis, drawn from the bottom up.
        colours: theirs.
    """
    size = _column_size(len(counts))
    joined = [counts[start : start + size].sum(axis=0) for start in range(0, len(counts), size)]
    width = SIDE / len(joined)
    gap = min(width * 0.12, 3.0)
    plot = Plot(
        label=label,
        x_label=x_label,
        y_label="share of tokens",
        x_ticks=_position_ticks(len(counts), size, len(joined)),
        y_ticks=[Tick(25.0 * k, f"{25 * k} %") for k in range(5)],
        legend=list(zip(colours, names, strict=True)),
        head=[x_label, "tokens", *names],
    )
    for column, tokens in enumerate(joined):
        low = column * size
        high = min(low + size, len(counts)) - 1
        where = str(low) if low == high else f"{low}-{high}"
        total = int(tokens.sum())
        shares = [count / total if total else 0.0 for count in tokens.tolist()]
        plot.rows.append([where, number(total), *map(percent, shares)])
        bottom = SIDE
        for share, name, colour in zip(shares, names, colours, strict=True):
            height = SIDE * share
            bottom -= height
            tip = f"{where}: {percent(share)} {name}, of {number(total)} tokens"
            rect = Rect(column * width + gap / 2, bottom, width - gap, height, colour, tip)
            plot.rects.append(rect)
    return plot


def _column_size(positions: int) -> int:
    """Positions of one column: 1, 2, 4, 5, 8, 10 or a multiple, so that few columns are left."""
    least = math.ceil(positions / MAX_COLUMNS)
    power = int(10 ** max(0, math.floor(math.log10(max(least, 1)))))
    return next(m * power for m in (1, 2, 4, 5, 8, 10) if m * power >= least)


def _position_ticks(positions: int, size: int, columns: int) -> list[Tick]:
    marks = [int(mark) for mark in steps(positions, 5) if mark < positions and mark == int(mark)]
    return [Tick(100 * (mark / size + 0.5 / size) / columns, str(mark)) for mark in marks]


def dot_plot(label: str, series: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> Plot:
    """Agreement against confidence, each dot with its interval; confidence is stretched towards 1.

    Args:
        label: what it shows.
        series: (name, colour, dots); a dot has `confidence`, `low`, `high` (the bin's ends),
            `agreement`, `interval` and `tokens`.
    """
    most = max(_nines(dot["confidence"]) for _, _, dots in series for dot in dots)
    end = max(1.0, math.ceil(most * 2) / 2)
    marks = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999]
    marks = [mark for mark in marks if _nines(mark) <= end + 1e-9]
    curve = [1 - 10 ** (-end * k / 60) for k in range(61)]
    path = "L".join(f"{SIDE * k / 60:.1f} {SIDE * (1 - c):.1f}" for k, c in enumerate(curve))
    plot = Plot(
        label=label,
        x_label="confidence of the exit",
        y_label="share that full depth agrees with",
        x_ticks=[Tick(100 * _nines(mark) / end, f"{mark:g}") for mark in marks],
        y_ticks=[Tick(25.0 * k, f"{25 * k} %") for k in range(5)],
        lines=[("guide", "M" + path)],
        head=["exit layer and confidence", "tokens", "agreement", "95 % interval"],
    )
    for name, colour, dots in series:
        plot.legend.append((colour, name))
        for dot in dots:
            _add_dot(plot, name, colour, dot, SIDE * _nines(dot["confidence"]) / end)
    return plot


def _nines(confidence: float) -> float:
    """How many nines a confidence has: 0.9 has one, 0.99 two."""
    return -math.log10(1 - min(max(confidence, 0.0), 0.99999))


def _add_dot(plot: Plot, name: str, colour: str, dot: Mapping[str, Any], x: float) -> None:
    low, high = dot["interval"]
    between = f"{percent(low)} to {percent(high)}"
    ends = f"{name}, {dot['low']:.3f} to {dot['high']:.3f}"
    agreement, tokens = percent(dot["agreement"]), number(dot["tokens"])
    tip = f"{ends}: {agreement} agree ({between}), {tokens} tokens"
    y, top, bottom = (SIDE * (1 - share) for share in (dot["agreement"], high, low))
    plot.dots.append(Dot(x, y, top, bottom, colour, tip))
    plot.rows.append([ends, tokens, agreement, between])


def _amounts(values: Sequence[float]) -> list[Tick]:
    def name(value: float) -> str:
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if values[-1] >= 10 * size:
                return f"{value / size:g}{unit if value else ''}"
        return f"{value:,.4g}" if values[-1] < 100 else f"{value:,.0f}"

    return [Tick(100 * value / values[-1], name(value)) for value in values]
