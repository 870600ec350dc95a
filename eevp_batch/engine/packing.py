"""Packed tokens: the one form in which anything runs through a segment.

A decode step brings one token per sequence, a prompt brings many, a token that goes deep may bring
waiting ones along. All of them become rows of one `[N, E]` batch, and this module says which row is
which token of which sequence, where its keys/values go, and what it may look at.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from eevp_batch.engine.invariance import Padding
from eevp_batch.engine.kv_store import SCRATCH_PAGE, KvStore
from eevp_batch.engine.sequence import Kind, Origin, Sequence, Waiting
from eevp_batch.engine.upload import columns_to_device


class Span(NamedTuple):
    """Rows [start, stop) of a pack: one sequence's tokens, in the order of their positions.

    Attributes:
        seat: the sequence's row of the page table.
        pages: pages that hold its positions up to the last of these rows.
        is_fresh: the rows are all positions from 0 on, so that no key need be read back.
        positions: of these rows, ascending.
    """

    start: int
    stop: int
    seat: int
    pages: list[int]
    is_fresh: bool
    positions: list[int]


class Lookup(NamedTuple):
    """Where the rows of a pack look, for kernels that read pages in place; R runs of rows.

    Attributes:
        starts: [R + 1] int32, first row of each run, and N.
        lengths: [R] int32, keys that the last row of each run sees: its position + 1.
        tables: [R, P] int32, the pages of each run's sequence.
        longest: rows of the longest run.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Rows of one segment run; N and W are padded with rows that write to the scratch page.

    Attributes:
        token_ids: [N] ids to embed, at depth 0; None deeper, where `slots` tell the hidden states.
        positions: [N] position of each row in its sequence.
        slots: [N] pool slot of each row.
        scored: positions whose states are asked for, by sequence; S in all.
        scored_rows: [S] their rows, in the same order.
        project_positions: [W] positions of the tokens that are only projected, by origin.
        project_slots: [W] their slots.
        project_before: [W] the slots of the tokens before them, 0 where a bridged part of a prompt
            begins; [0] where the pool keeps no states for them.
        origins: which of the W have which origin; these cover all of them, in order.
        spans: the rows of each sequence; those with a single row come first.
        num_tokens: rows that are real.
        lookup: what a paged kernel made of the spans, where somebody has asked for it already.
    """

    token_ids: torch.Tensor | None
    positions: torch.Tensor
    slots: torch.Tensor
    scored: list[range]
    scored_rows: torch.Tensor
    project_positions: torch.Tensor
    project_slots: torch.Tensor
    project_before: torch.Tensor
    origins: list[tuple[Origin, slice]]
    spans: list[Span]
    num_tokens: int
    lookup: Lookup | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.positions)


def pack(
    sequences: SequenceOf[Sequence], depth: int, pool: KvStore, padding: Padding
) -> PackedTokens:
    """Pack what the sequences must bring into segment `depth`.

    Sequences that bring one token come first, so that attention can take them as one batch.

    Args:
        sequences: who runs, with pages up to the front token.
        depth: 0-based segment.
        pool: where they live.
        padding: of N, and of the rows of each origin in W.
    """
    entering = [(sequence, sequence.waiting(depth)) for sequence in sequences]
    order = sorted(range(len(entering)), key=lambda i: len(entering[i][1].run) > 1)
    rows = _Rows(pool, padding)
    scored_rows = [range(0)] * len(entering)
    for index in order:
        scored_rows[index] = rows.add(*entering[index])
    return rows.packed(depth, [waiting.scored for _, waiting in entering], scored_rows)


class _Rows:
    """The columns of a pack while it grows."""

    def __init__(self, pool: KvStore, padding: Padding) -> None:
        self._device, self._padding = pool.device, padding
        self._page_size = pool.page_size
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._looks_back = pool.first is not None
        self._project: dict[Origin, tuple[list[int], ...]] = {}  # positions, slots, slots before
        self._spans: list[Span] = []

    def add(self, sequence: Sequence, waiting: Waiting) -> range:
        """Append what one sequence brings; returns the rows of its scored positions."""
        start, run = len(self._positions), waiting.run
        self._positions += run
        self._slots += _slots(sequence.pages, run, self._page_size)
        self._token_ids += [sequence.token_ids[position] for position in run]
        for origin, positions in waiting.project.items():
            columns = self._project.setdefault(origin, ([], [], []))
            columns[0].extend(positions)
            columns[1].extend(_slots(sequence.pages, positions, self._page_size))
            if self._looks_back:
                columns[2].extend(self._before(sequence, origin.kind, positions))
        stop = len(self._positions)
        pages = sequence.pages[: run[-1] // self._page_size + 1]
        is_fresh = len(run) == run[-1] + 1
        self._spans.append(Span(start, stop, sequence.seat, pages, is_fresh, run))
        return range(stop - len(waiting.scored), stop)

    def _before(self, sequence: Sequence, kind: Kind, positions: list[int]) -> list[int]:
        """Slots of the positions before; a row's own, so that nothing else decides which."""
        start = sequence.bridged_from if kind == "prompt" else 0
        before = [position - 1 for position in positions if position > start]
        none = [SCRATCH_PAGE] * (len(positions) - len(before))
        return none + _slots(sequence.pages, before, self._page_size)

    def packed(self, depth: int, scored: list[range], scored_rows: list[range]) -> PackedTokens:
        """The pack, padded."""
        skipped_positions: list[int] = []
        skipped_slots: list[int] = []
        slots_before: list[int] = []
        origins = []
        for origin, columns in self._project.items():
            start = len(skipped_slots)
            skipped_positions += self._padded(columns[0])
            skipped_slots += self._padded(columns[1])
            slots_before += self._padded(columns[2])
            origins.append((origin, slice(start, len(skipped_slots))))
        sent = columns_to_device(
            [
                self._padded(self._token_ids if depth == 0 else []),
                self._padded(self._positions),
                self._padded(self._slots),
                [*chain(*scored_rows)],
                skipped_positions,
                skipped_slots,
                slots_before,
            ],
            self._device,
        )
        token_ids, positions, slots, rows, *projected = sent
        return PackedTokens(
            token_ids=token_ids if depth == 0 else None,
            positions=positions,
            slots=slots,
            scored=scored,
            scored_rows=rows,
            project_positions=projected[0],
            project_slots=projected[1],
            project_before=projected[2],
            origins=origins,
            spans=self._spans,
            num_tokens=len(self._positions),
        )

    def _padded(self, column: list[int]) -> list[int]:
        """Padded with zeros: id 0 at position 0, in slot 0 of the scratch page."""
        return column + [0] * (self._padding(len(column)) - len(column))


def _slots(pages: list[int], positions: SequenceOf[int], size: int) -> list[int]:
    """Pool slots of a sequence's positions."""
    return [pages[t // size] * size + t % size for t in positions]
