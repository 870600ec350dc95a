"""Which segments go on which device: plain numbers, no tensors.

Segments are never split, and a device holds consecutive ones, so that hidden states cross from one
device to the next and never back. A page of keys and values is a page on every device: the device
with the least room for them decides how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eevp_batch.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes.

    Attributes:
        segments: weights of each segment's layers.
        segment_layers: layers of each segment.
        head: norm and LM head; every device has them, for segments end at exits.
        embedding: on the first device only; 0 where it is the head.
        kv_page: keys and values of one page in one layer.
        state_page: hidden states of one page, on every device.
    """

    segments: Sequence[int]
    segment_layers: Sequence[int]
    head: int
    embedding: int
    kv_page: int
    state_page: int

    def weights(self, device: int, segments: range) -> int:
        """Bytes of some segments' weights on device number `device`."""
        own = sum(self.segments[number] for number in segments)
        return own + self.head + (0 if device else self.embedding)

    def page(self, segments: range) -> int:
        """Bytes of one page on a device that has these segments."""
        return self.kv_page * sum(self.segment_layers[n] for n in segments) + self.state_page


@dataclass(frozen=True, slots=True)
class Room:
    """A device as placement sees it.

    Attributes:
        name: for messages.
        memory: bytes that weights, keys and values may take.
    """

    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes.

    Attributes:
        segments: of each device, in order; none is empty.
        num_pages: pages of keys and values that fit, at most as many as were wanted.
    """

    segments: tuple[range, ...]
    num_pages: int


def place(model: ModelBytes, rooms: Sequence[Room], wanted_pages: int) -> Placement:
    """Put whole segments on devices, so that keys and values get the most pages they can use.

    Of the placements that give as many, the one whose fullest device is the least full.

    Args:
        model: what it takes.
        rooms: the devices, in the order in which tokens come by; each gets a segment at least.
        wanted_pages: pages that are of use.

    Raises:
        UsageError: more devices than segments, or no placement leaves room for a single page.
    """
    num_segments = len(model.segments)
    if len(rooms) > num_segments:
        raise UsageError(
            f"devices: found {len(rooms)}; allowed: at most {num_segments}, one for each segment "
            "between two exit layers, for these are never split"
        )

    def pages(device: int, segments: range) -> float:
        free = rooms[device].memory - model.weights(device, segments)
        return min(free // model.page(segments), wanted_pages)

    best = _cut(num_segments, len(rooms), pages)
    num_pages = int(min(pages(device, segments) for device, segments in enumerate(best)))
    if num_pages < 1:
        raise UsageError(_shortage(model, rooms, best))

    def emptiness(device: int, segments: range) -> float:
        taken = model.weights(device, segments) + num_pages * model.page(segments)
        return 1 - taken / rooms[device].memory

    return Placement(_cut(num_segments, len(rooms), emptiness), num_pages)


def _cut(
    num_segments: int, num_devices: int, score: Callable[[int, range], float]
) -> tuple[range, ...]:
    """The cut into consecutive, non-empty parts whose lowest score is the highest.

    Args:
        num_segments: to cut.
        num_devices: parts.
        score: of a part on a device.
    """
    # by end: the lowest score of the first devices with segments up to there, and their parts
    best: dict[int, tuple[float, tuple[range, ...]]] = {0: (float("inf"), ())}
    for device in range(num_devices):
        found: dict[int, tuple[float, tuple[range, ...]]] = {}
        for start, (lowest, parts) in best.items():
            for stop in range(start + 1, num_segments - (num_devices - device - 1) + 1):
                part = range(start, stop)
                value = min(lowest, score(device, part))
                if stop not in found or value > found[stop][0]:
                    found[stop] = (value, (*parts, part))
        best = found
    return best[num_segments][1]


def _shortage(model: ModelBytes, rooms: Sequence[Room], parts: Sequence[range]) -> str:
    """What does not fit where, in the best of the placements."""
    lines = []
    for device, (room, part) in enumerate(zip(rooms, parts, strict=True)):
        needed = model.weights(device, part) + model.page(part)
        if needed > room.memory:
            lines.append(
                f"{room.name} has {_size(room.memory)} and would need {_size(needed)} for "
                f"{_named(part)} ({sum(model.segment_layers[n] for n in part)} layers), the head "
                "and one page of keys and values"
            )
    return f"the model does not fit: {'; '.join(lines)}; allowed: larger devices, or more of them"


def _named(part: range) -> str:
    first, last = part.start + 1, part.stop
    return f"segment {first}" if first == last else f"segments {first} to {last}"


def _size(number: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"
