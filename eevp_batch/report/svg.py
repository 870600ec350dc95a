"""Line charts as SVG, without a plotting library: axes, lines, bars behind them, a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 840, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 270, 44, 52
COLOURS = (
    "#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#c97b1a", "#45545f", "#17a2a2", "#d46ab1",
    "#8a8f1a", "#6b4226",
)  # fmt: skip
BAR_COLOUR = "#d9dee3"
TICKS = 5
"""About as many on an axis, at round numbers."""
PAD = 0.05
"""Of the axis, so that no point lies on its end."""

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Points],
    bars: Mapping[str, Points] | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] = (0.0, 1.0),
    labels: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A chart as the text of an SVG file.

    Args:
        title: above it.
        x_label: below it.
        y_label: beside it.
        lines: points (x, y) by name; a line of one point is a large dot.
        bars: as lines, at most one of them; drawn behind.
        x_range: of the axis; that of the points.
        y_range: of the axis.
        labels: by name of a line, a text below each of its points, which are drawn large.
    """
    bars, labels = bars or {}, labels or {}
    points = [point for some in (*lines.values(), *bars.values()) for point in some]
    scale = _Scale(x_range or _range([x for x, _ in points]), y_range)
    parts = [_axes(scale, title, x_label, y_label)]
    names = []
    for name, some in bars.items():
        names.append((name, BAR_COLOUR))
        parts += [_bar(scale, x, y, max(len(some), 1)) for x, y in some]
    for number, (name, some) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        names.append((name, colour))
        parts.append(_line(scale, some, colour, name in labels))
        parts += [
            _text(scale.x(x), scale.y(y) + 18, text, more=f'fill="{colour}"')
            for (x, y), text in zip(some, labels.get(name, ()), strict=False)
        ]
    legend = [_entry(row, name, colour) for row, (name, colour) in enumerate(names)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
    )
    return head + "\n".join([*parts, *legend]) + "\n</svg>\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high <= low:
        return low - 0.5, high + 0.5
    return low - PAD * (high - low), high + PAD * (high - low)


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


class _Scale:
    """From numbers to places."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.width, self.height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(self, value: float) -> float:
        """Place from the left."""
        low, high = self.x_range
        return LEFT + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Place from the top."""
        low, high = self.y_range
        return TOP + self.height * (1 - (value - low) / (high - low))


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _axes(scale: _Scale, title: str, x_label: str, y_label: str) -> str:
    bottom, right = TOP + scale.height, LEFT + scale.width
    parts = [_text(LEFT, 24, title, "start", 'font-size="15"')]
    parts.append(_text(LEFT + scale.width / 2, HEIGHT - 12, x_label))
    middle = TOP + scale.height / 2
    parts.append(_text(16, middle, y_label, more=f'transform="rotate(-90 16 {middle:.1f})"'))
    for y in round_ticks(*scale.y_range):
        at = scale.y(y)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#e8ebee"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{y:.4g}", "end"))
    for x in round_ticks(*scale.x_range):
        at = scale.x(x)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#45545f"/>')
        parts.append(_text(at, bottom + 18, f"{x:.4g}"))
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#45545f"/>')
    return "\n".join(parts)


def _bar(scale: _Scale, x: float, y: float, count: int) -> str:
    low, high = scale.x_range
    width = 0.7 * scale.width / max(count + 1, high - low)
    top = scale.y(y)
    return (
        f'<rect x="{scale.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{TOP + scale.height - top:.1f}" fill="{BAR_COLOUR}"/>'
    )


def _line(scale: _Scale, points: Points, colour: str, is_large: bool) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in points]
    radius = 5 if is_large or len(points) == 1 else 2.5
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" stroke="white"/>'
        for x, y in places
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


def _entry(row: int, name: str, colour: str) -> str:
    x, y = WIDTH - RIGHT + 14, TOP + 8 + 20 * row
    return f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{colour}"/>' + _text(
        x + 20, y, name, "start"
    )
