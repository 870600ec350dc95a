"""Packed tokens: the one form in which anything runs through a segment.

A decode step brings one token per sequence, a prompt brings many, a token that goes deep may bring
waiting ones along. All of them become rows of one `[N, E]` batch, and this module says which row is
which token of which sequence, where its keys/values go, and what it may look at.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from eevp_batch.engine.attention import AttentionLayout, RaggedRows
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.sequence import Sequence

ROW_MULTIPLE = 16
"""Batches are padded to a multiple of this many rows. CPU GEMM kernels switch their summation order
for very few rows; from 4 rows on a row's result does not depend on how many others there are, which
is what makes a row's output independent of its batch mates to the last bit (bfloat16)."""


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Rows of one segment run; N and W are padded with rows that write to the scratch page.

    Attributes:
        token_ids: [N] ids to embed, at depth 0; None deeper, where `slots` tell the hidden states.
        positions: [N] position of each row in its sequence.
        slots: [N] pool slot of each row.
        front_rows: [B] row of each sequence's front token, in the order of the sequences.
        project_positions: [W] positions of the tokens that are only projected.
        project_slots: [W] their slots.
        project_rows: [W * num_kv_heads] where their keys/values go, see `KvPool.token_rows`.
        num_tokens: rows that are real.
        layout: what attention needs to know, the same for every layer.
    """

    token_ids: torch.Tensor | None
    positions: torch.Tensor
    slots: torch.Tensor
    front_rows: torch.Tensor
    project_positions: torch.Tensor
    project_slots: torch.Tensor
    project_rows: torch.Tensor
    num_tokens: int
    layout: AttentionLayout


def pack(sequences: SequenceOf[Sequence], depth: int, pool: KvPool) -> PackedTokens:
    """Pack what the sequences must bring into segment `depth`.

    Sequences that bring one token come first, so that attention can take them as one batch.
    """
    waiting = [sequence.waiting(depth) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: len(waiting[i].run) > 1)
    num_single = sum(len(item.run) == 1 for item in waiting)

    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    project_positions: list[int] = []
    project_slots: list[int] = []
    front_rows = [0] * len(sequences)
    ragged: list[RaggedRows] = []
    device = pool.page_table.device
    for index in order:
        sequence, item = sequences[index], waiting[index]
        start = len(positions)
        positions += item.run
        slots += [pool.slot(sequence, position) for position in item.run]
        if depth == 0:
            token_ids += [sequence.token_ids[position] for position in item.run]
        front_rows[index] = len(positions) - 1
        project_positions += item.project
        project_slots += [pool.slot(sequence, position) for position in item.project]
        if len(item.run) > 1:
            ragged.append(
                RaggedRows(
                    start=start,
                    stop=len(positions),
                    page_rows=pool.page_rows(torch.tensor([sequence.pages], device=device)),
                    is_fresh=len(item.run) == sequence.front + 1,
                )
            )

    num_tokens = len(positions)
    for column in (positions, slots, token_ids, project_positions, project_slots):
        _pad(column)
    position_tensor = torch.tensor(positions, device=device)
    slot_tensor = torch.tensor(slots, device=device)
    project_slot_tensor = torch.tensor(project_slots, dtype=torch.int64, device=device)
    singles = [sequences[index] for index in order[:num_single]]
    return PackedTokens(
        token_ids=torch.tensor(token_ids, device=device) if depth == 0 else None,
        positions=position_tensor,
        slots=slot_tensor,
        front_rows=torch.tensor(front_rows, device=device),
        project_positions=torch.tensor(project_positions, dtype=torch.int64, device=device),
        project_slots=project_slot_tensor,
        project_rows=pool.token_rows(project_slot_tensor),
        num_tokens=num_tokens,
        layout=AttentionLayout(
            pool=pool,
            token_rows=pool.token_rows(slot_tensor),
            positions=position_tensor,
            single_page_rows=pool.page_rows(_pages(singles, pool)),
            num_single=num_single,
            ragged=ragged,
        ),
    )


def _pad(column: list[int]) -> None:
    """Pad with zeros (position 0, slot 0 of the scratch page) to a multiple of ROW_MULTIPLE."""
    column += [0] * (-len(column) % ROW_MULTIPLE)


def _pages(singles: SequenceOf[Sequence], pool: KvPool) -> torch.Tensor:
    """[num_single, P] page ids, P the most pages among them."""
    width = max((KvPool.pages_for(s.front + 1) for s in singles), default=0)
    seats = torch.tensor([s.seat for s in singles], dtype=torch.int64)
    return pool.page_table[seats.to(pool.page_table.device), :width]

