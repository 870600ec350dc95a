"""Colours of the exit layers: the earlier a token left, the stronger; the last layer is grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_LIGHT = ((0x0B, 0x6E, 0x6E), (0x8F, 0xD3, 0xC4))  # first exit, last early exit
_DARK = ((0x5E, 0xEA, 0xD4), (0x1F, 0x6B, 0x68))
_LAST = ("#c9d1da", "#4a5565")


class ExitColour(NamedTuple):
    """A class of the page and its colours in the light and in the dark theme."""

    name: str
    light: str
    dark: str


def exit_colours(exit_layers: Sequence[int]) -> list[ExitColour]:
    """One for each exit layer, the last layer among them."""
    early = len(exit_layers) - 1
    colours = []
    for number in range(early):
        share = number / max(early - 1, 1)
        light, dark = (_between(*ends, share) for ends in (_LIGHT, _DARK))
        colours.append(ExitColour(f"x{number}", light, dark))
    return [*colours, ExitColour(f"x{early}", *_LAST)]


def _between(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
    mixed = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
