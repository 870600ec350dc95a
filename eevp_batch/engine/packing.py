"""Packed tokens: the one form in which anything runs through a segment.

A decode step brings one token per sequence, a prompt brings many, a token that goes deep may bring
waiting ones along. All of them become rows of one `[N, E]` batch, and this module says which row is
which token of which sequence, where its keys/values go, and what it may look at.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain

import torch

from eevp_batch.engine.attention import AttentionLayout, RaggedRows
from eevp_batch.engine.invariance import ROW_MULTIPLE
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.sequence import Sequence, Waiting


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Rows of one segment run; N and W are padded with rows that write to the scratch page.

    Attributes:
        token_ids: [N] ids to embed, at depth 0; None deeper, where `slots` tell the hidden states.
        positions: [N] position of each row in its sequence.
        slots: [N] pool slot of each row.
        scored: positions whose states are asked for, by sequence; S in all.
        scored_rows: [S] their rows, in the same order.
        project_positions: [W] positions of the tokens that are only projected.
        project_slots: [W] their slots.
        project_rows: [W * num_kv_heads] where their keys/values go, see `KvPool.token_rows`.
        num_tokens: rows that are real.
        layout: what attention needs to know, the same for every layer.
    """

    token_ids: torch.Tensor | None
    positions: torch.Tensor
    slots: torch.Tensor
    scored: list[range]
    scored_rows: torch.Tensor
    project_positions: torch.Tensor
    project_slots: torch.Tensor
    project_rows: torch.Tensor
    num_tokens: int
    layout: AttentionLayout


def pack(sequences: SequenceOf[Sequence], depth: int, pool: KvPool) -> PackedTokens:
    """Pack what the sequences must bring into segment `depth`.

    Sequences that bring one token come first, so that attention can take them as one batch.
    """
    entering = [(sequence, sequence.waiting(depth)) for sequence in sequences]
    order = sorted(range(len(entering)), key=lambda i: len(entering[i][1].run) > 1)
    rows = _Rows(pool)
    scored_rows = [range(0)] * len(entering)
    for index in order:
        scored_rows[index] = rows.add(*entering[index])
    return rows.packed(depth, [waiting.scored for _, waiting in entering], scored_rows)


class _Rows:
    """The columns of a pack while it grows."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._device = pool.page_table.device
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._project_positions: list[int] = []
        self._project_slots: list[int] = []
        self._singles: list[Sequence] = []
        self._ragged: list[RaggedRows] = []

    def add(self, sequence: Sequence, waiting: Waiting) -> range:
        """Append what one sequence brings; returns the rows of its scored positions."""
        pool, start = self._pool, len(self._positions)
        self._positions += waiting.run
        self._slots += [pool.slot(sequence, position) for position in waiting.run]
        self._token_ids += [sequence.token_ids[position] for position in waiting.run]
        self._project_positions += waiting.project
        self._project_slots += [pool.slot(sequence, position) for position in waiting.project]
        if len(waiting.run) == 1:
            self._singles.append(sequence)
        else:
            pages = torch.tensor([sequence.pages], device=self._device)
            is_fresh = len(waiting.run) == sequence.front + 1
            self._ragged.append(
                RaggedRows(start, len(self._positions), pool.page_rows(pages), is_fresh)
            )
        stop = len(self._positions)
        return range(stop - len(waiting.scored), stop)

    def packed(self, depth: int, scored: list[range], scored_rows: list[range]) -> PackedTokens:
        """The pack, padded."""
        pool, num_tokens = self._pool, len(self._positions)
        positions, slots = self._padded(self._positions), self._padded(self._slots)
        project_slots = self._padded(self._project_slots)
        return PackedTokens(
            token_ids=self._padded(self._token_ids) if depth == 0 else None,
            positions=positions,
            slots=slots,
            scored=scored,
            scored_rows=torch.tensor([*chain(*scored_rows)], device=self._device),
            project_positions=self._padded(self._project_positions),
            project_slots=project_slots,
            project_rows=pool.token_rows(project_slots),
            num_tokens=num_tokens,
            layout=AttentionLayout(
                pool=pool,
                token_rows=pool.token_rows(slots),
                positions=positions,
                single_page_rows=pool.page_rows(self._single_pages()),
                num_single=len(self._singles),
                ragged=self._ragged,
            ),
        )

    def _padded(self, column: list[int]) -> torch.Tensor:
        """[N] int64, padded with zeros: id 0 at position 0, in slot 0 of the scratch page."""
        padding = [0] * (-len(column) % ROW_MULTIPLE)
        return torch.tensor(column + padding, dtype=torch.int64, device=self._device)

    def _single_pages(self) -> torch.Tensor:
        """[num_single, P] page ids, P the most pages among them."""
        width = max((KvPool.pages_for(s.front + 1) for s in self._singles), default=0)
        seats = torch.tensor([s.seat for s in self._singles], dtype=torch.int64)
        return self._pool.page_table[seats.to(self._device), :width]
