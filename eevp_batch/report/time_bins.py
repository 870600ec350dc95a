"""Amounts over time in a bounded number of bins, for spans that are not known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TimeBins:
    """Sums by time from 0 on; when there are too many bins, neighbours are joined.

    Attributes:
        width_s: seconds of a bin.
        end_s: the latest moment that was added; the last bin ends there.
        sums: by bin.
    """

    max_bins: int = 240
    width_s: float = 0.25
    end_s: float = 0.0
    sums: list[float] = field(default_factory=list)

    def add(self, start_s: float, stop_s: float, amount: float) -> None:
        """Spread an amount evenly over a span; a span without length is a moment."""
        self._reach(stop_s)
        self.end_s = max(self.end_s, stop_s)
        first, last = self._bin(start_s), self._bin(stop_s)
        if first == last or stop_s <= start_s:
            self.sums[last] += amount
            return
        rate = amount / (stop_s - start_s)
        for number in range(first, last + 1):
            low, high = number * self.width_s, (number + 1) * self.width_s
            self.sums[number] += rate * max(0.0, min(stop_s, high) - max(start_s, low))

    def _bin(self, at_s: float) -> int:
        return max(0, int(at_s / self.width_s))

    def _reach(self, stop_s: float) -> None:
        while self._bin(stop_s) >= self.max_bins:
            if len(self.sums) % 2:
                self.sums.append(0.0)
            self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)]
            self.width_s *= 2
        self.sums += [0.0] * (self._bin(stop_s) + 1 - len(self.sums))

    def rates(self) -> list[tuple[float, float]]:
        """(start of the bin, amount per second, 0 after the end); a rate holds until the next."""
        found = []
        for number, amount in enumerate(self.sums):
            start_s = number * self.width_s
            length_s = min(self.width_s, self.end_s - start_s)
            found.append((start_s, amount / length_s if length_s > 0 else 0.0))
        return [*found, (self.end_s, 0.0)]

    def running_totals(self) -> list[tuple[float, float]]:
        """(end of the bin, all that came up to there), from (0, 0) on."""
        points, total = [(0.0, 0.0)], 0.0
        for number, amount in enumerate(self.sums, 1):
            total += amount
            points.append((min(number * self.width_s, self.end_s), total))
        return points
