"""The paged pool of keys, values and waiting hidden states.

A *slot* holds one token: its key and value in every layer, and the hidden state it last had. Slots
come in pages of `PAGE_SIZE`; a sequence owns pages, position t of it lives in
`pages[t // PAGE_SIZE] * PAGE_SIZE + t % PAGE_SIZE`. All layers share one page table, although a
token that left early has not been written to the deeper ones yet.
"""

from __future__ import annotations

import numpy
import torch

from eevp_batch.engine.sequence import Sequence
from eevp_batch.errors import EngineError

PAGE_SIZE = 16
SCRATCH_PAGE = 0
"""Page 0 belongs to nobody: rows that only pad a batch write there."""


class KvPool:
    """Keys, values and hidden states of all resident sequences.

    Pages are *reserved* when a sequence is admitted, for as many positions as it can ever have, and
    *allocated* as it grows: a sequence that was admitted never runs out, and memory that nobody
    writes is never touched.

    Args:
        num_pages: pages to hold, the scratch page apart.
        num_layers: L.
        num_kv_heads: heads of keys and values.
        head_size: D.
        hidden_size: E.
        max_resident: most sequences at a time; each has a *seat*, its row of the page table.
        max_pages: most pages of one sequence.
    """

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        hidden_size: int,
        max_resident: int,
        max_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_slots = (num_pages + 1) * PAGE_SIZE
        self.num_pages = num_pages
        self.max_pages = min(max_pages, num_pages)
        self.num_kv_heads = num_kv_heads
        self._heads = torch.arange(num_kv_heads, device=device)
        # [L][num_pages + 1, num_kv_heads, PAGE_SIZE, D]: the pages of one key head, gathered, are a
        # matrix that a product can read without another copy.
        rows = num_slots * num_kv_heads
        self.keys = [_zeros(rows, head_size, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(rows, head_size, dtype, device) for _ in range(num_layers)]
        self.hidden = _zeros(num_slots, hidden_size, dtype, device)  # [num_slots, E]
        # [max_resident, max_pages], unused entries point at the scratch page.
        self.page_table = torch.zeros(
            max_resident, self.max_pages, dtype=torch.int64, device=device
        )
        self._free_pages = list(range(num_pages, 0, -1))
        self._free_seats = list(range(max_resident - 1, -1, -1))
        self._reserved = 0

    @property
    def num_free_seats(self) -> int:
        return len(self._free_seats)

    @property
    def max_positions(self) -> int:
        """Most tokens that one sequence can have."""
        return self.max_pages * PAGE_SIZE

    @property
    def num_pages_in_use(self) -> int:
        return self.num_pages - len(self._free_pages)

    @property
    def is_empty(self) -> bool:
        """True when no page, seat or reservation is held."""
        return (
            len(self._free_pages) == self.num_pages
            and len(self._free_seats) == self.page_table.shape[0]
            and not self._reserved
        )

    @staticmethod
    def pages_for(num_positions: int) -> int:
        """Pages that hold `num_positions` tokens."""
        return -(-num_positions // PAGE_SIZE)

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether the empty pool could take this sequence at its longest."""
        return self.pages_for(sequence.max_positions) <= self.max_pages

    def can_admit(self, sequence: Sequence) -> bool:
        """Whether a seat is free and the unreserved pages last for this sequence."""
        needed = self.pages_for(sequence.max_positions)
        return bool(self._free_seats) and self._reserved + needed <= self.num_pages

    def admit(self, sequence: Sequence) -> None:
        """Give the sequence a seat and reserve its pages."""
        if not self.can_admit(sequence):
            raise EngineError(f"row {sequence.prompt.row_id!r} was admitted without room for it")
        sequence.seat = self._free_seats.pop()
        self._reserved += self.pages_for(sequence.max_positions)

    def grow(self, sequence: Sequence) -> None:
        """Allocate pages up to the front token."""
        for index in range(len(sequence.pages), self.pages_for(sequence.front + 1)):
            page = self._free_pages.pop()
            sequence.pages.append(page)
            self.page_table[sequence.seat, index] = page

    def release(self, sequence: Sequence, *, scrub: bool = False) -> None:
        """Take back seat, pages and reservation.

        Args:
            sequence: a resident sequence.
            scrub: zero its pages, needed when they may hold NaN: a masked key is multiplied by
                zero, and NaN would survive that in the next owner's attention.
        """
        if scrub:
            for page in sequence.pages:
                for store in (*self.keys, *self.values, self.hidden):
                    store.view(self.num_pages + 1, -1)[page] = 0
        self.page_table[sequence.seat, : len(sequence.pages)] = SCRATCH_PAGE
        self._free_pages.extend(reversed(sequence.pages))
        self._free_seats.append(sequence.seat)
        self._reserved -= self.pages_for(sequence.max_positions)
        sequence.pages, sequence.seat = [], -1

    @staticmethod
    def slot(sequence: Sequence, position: int) -> int:
        """Where position `position` of the sequence lives."""
        page, offset = divmod(position, PAGE_SIZE)
        return sequence.pages[page] * PAGE_SIZE + offset

    def token_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the stores that hold the tokens at slots [N], [N * num_kv_heads]."""
        page, offset = slots[:, None] // PAGE_SIZE, slots[:, None] % PAGE_SIZE
        return ((page * self.num_kv_heads + self._heads) * PAGE_SIZE + offset).view(-1)

    def page_rows(self, pages: torch.Tensor) -> torch.Tensor:
        """What `read` takes for pages [B, P]: [B, num_kv_heads, P]."""
        return pages[:, None, :] * self.num_kv_heads + self._heads[None, :, None]

    def write(
        self, layer_index: int, token_rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store keys (after rotary) and values, both [N, num_kv_heads, D]."""
        width = key.shape[-1]
        self.keys[layer_index].index_copy_(0, token_rows, key.reshape(-1, width))
        self.values[layer_index].index_copy_(0, token_rows, value.reshape(-1, width))

    def read(self, layer_index: int, page_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of whole pages.

        Args:
            layer_index: 0-based layer.
            page_rows: [B, num_kv_heads, P], see `page_rows`.

        Returns:
            Two contiguous tensors [B, num_kv_heads, P * PAGE_SIZE, D].
        """
        batch, heads, columns = page_rows.shape
        flat = page_rows.view(-1)
        shape = (batch, heads, columns * PAGE_SIZE, -1)
        key, value = (
            store[layer_index]
            .view((self.num_pages + 1) * heads, -1)
            .index_select(0, flat)
            .view(shape)
            for store in (self.keys, self.values)
        )
        return key, value


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [rows, columns], for even a masked key must be finite.

    On the CPU they come from `calloc`, so that memory nobody writes is never touched;
    `torch.zeros` would touch all of it.
    """
    if device.type != "cpu":
        return torch.zeros(rows, columns, dtype=dtype, device=device)
    num_bytes = rows * columns * dtype.itemsize
    return (
        torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(dtype).view(rows, columns)
    )
