"""The paged pool of keys, values and waiting hidden states.

A *slot* holds one token: its key and value in every layer, and the hidden state it last had. Slots
come in pages; a sequence owns pages, position t of it lives in
`pages[t // page_size] * page_size + t % page_size`. All layers share one page table, although a
token that left early has not been written to the deeper ones yet. A page may have several owners:
sequences that begin with the same tokens, so that a page is the n-th page of all its owners.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from eevp_batch.engine.kv_store import PAGE_SIZE, SCRATCH_PAGE, FirstStates, KvLayout, KvStore
from eevp_batch.engine.sequence import Sequence
from eevp_batch.errors import EngineError


class KvPool(KvStore):
    """Keys, values and hidden states of all resident sequences, on one device or several.

    It is the store of the first device, and knows the others: a page is a page on all of them.

    Pages are *promised* when a sequence is admitted, for as many tokens as it is expected to have,
    and *allocated* as it grows; memory that nobody writes is never touched. A sequence that grows
    beyond its promise takes what is free, and where nothing is, somebody has to go.

    Args:
        num_pages: pages to hold, the scratch page apart.
        num_layers: layers on the first device; L where it is the only one.
        num_kv_heads: heads of keys and values.
        head_size: D.
        hidden_size: E.
        max_resident: most sequences at a time; each has a *seat*, its row of the page table. There
            is one more, for a prefix while it is filled.
        max_pages: most pages of one sequence.
        dtype: of keys and values.
        hidden_dtype: of hidden states.
        layout: how a page lies in memory.
        page_size: tokens of a page.
        first: where states after the first exit layer stay; None: nobody asks for them.
        others: the other devices' stores, of as many pages, in the order in which tokens come by.

    Attributes:
        stores: of all devices, this one first.
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
        hidden_dtype: torch.dtype,
        layout: KvLayout = "head",
        page_size: int = PAGE_SIZE,
        first: FirstStates | None = None,
        others: SequenceOf[KvStore] = (),
    ) -> None:
        super().__init__(
            num_pages,
            range(num_layers),
            num_kv_heads,
            head_size,
            hidden_size,
            dtype,
            device,
            hidden_dtype,
            layout,
            page_size,
            first,
        )
        self.max_pages = min(max_pages, num_pages)
        self.stores: list[KvStore] = [self, *others]
        table = torch.zeros(max_resident + 1, self.max_pages, dtype=torch.int64)
        for number, store in enumerate(self.stores, 1):
            store.page_table, store.deeper = table, self.stores[number:]
        self._free_pages = list(range(num_pages, 0, -1))
        self._free_seats = list(range(max_resident - 1, -1, -1))
        self._prefix_seat = max_resident
        self._num_owners = [0] * (num_pages + 1)
        self._num_promised = 0
        self._tainted: set[int] = set()

    # --- who owns what ---------------------------------------------------------------------------

    @property
    def num_free_seats(self) -> int:
        return len(self._free_seats)

    @property
    def max_positions(self) -> int:
        """Most tokens that one sequence can have."""
        return self.max_pages * self.page_size

    @property
    def num_pages_in_use(self) -> int:
        return self.num_pages - len(self._free_pages)

    @property
    def num_unpromised_pages(self) -> int:
        """Free pages that no resident sequence counts on."""
        return len(self._free_pages) - self._num_promised

    @property
    def is_empty(self) -> bool:
        """True when no page, seat or promise is held."""
        return (
            len(self._free_pages) == self.num_pages
            and len(self._free_seats) == self._prefix_seat
            and not self._num_promised
        )

    def is_shared(self, pages: list[int]) -> bool:
        """Whether any of these pages has a second owner."""
        return any(self._num_owners[page] > 1 for page in pages)

    def pages_for(self, num_positions: int) -> int:
        """Pages that hold `num_positions` tokens."""
        return -(-num_positions // self.page_size)

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether the empty pool could take this sequence at its longest."""
        return self.pages_for(sequence.max_positions) <= self.max_pages

    def can_admit(self, num_positions: int, num_shared: int = 0) -> bool:
        """Whether a seat is free and the unpromised pages last for so many positions.

        Args:
            num_positions: tokens that the sequence is expected to have.
            num_shared: leading ones whose keys/values are there already.
        """
        needed = self.pages_for(num_positions) - num_shared // self.page_size
        return bool(self._free_seats) and needed <= self.num_unpromised_pages

    def admit(
        self, sequence: Sequence, num_positions: int, shared: list[int], num_shared: int = 0
    ) -> None:
        """Give the sequence a seat, promise it pages, and let it share a prefix.

        Args:
            sequence: who comes.
            num_positions: tokens that it is expected to have.
            shared: pages that hold its first `num_shared` positions at every depth; whole pages get
                another owner, the last one is copied if it is only begun.
            num_shared: 0 where nothing is shared.
        """
        if not self.can_admit(num_positions, num_shared):
            raise EngineError(f"row {sequence.prompt.row_id!r} was admitted without room for it")
        sequence.seat = self._free_seats.pop()
        num_whole = num_shared // self.page_size
        sequence.pages = shared[:num_whole]
        for page in sequence.pages:
            self._num_owners[page] += 1
        if num_whole:
            self.page_table[sequence.seat, :num_whole] = torch.tensor(sequence.pages)
        sequence.promised = self.pages_for(num_positions) - num_whole
        self._num_promised += sequence.promised
        if num_shared % self.page_size:
            self._allocate(sequence)
            for store in self.stores:
                store.copy_page(sequence.pages[-1], shared[num_whole])
        sequence.share(num_shared)

    def seat_prefix(self, sequence: Sequence, shared: list[int], num_shared: int) -> None:
        """Give a prefix the extra seat and all its pages; see `admit`.

        The caller made sure that there are enough unpromised pages.
        """
        self._free_seats.append(self._prefix_seat)
        self.admit(sequence, sequence.num_prompt, shared, num_shared)
        self.grow(sequence)

    def unseat_prefix(self, sequence: Sequence) -> list[int]:
        """Take the seat back once the prefix is filled; the pages stay, owned by the caller."""
        pages = sequence.pages
        self.page_table[sequence.seat] = SCRATCH_PAGE
        sequence.pages, sequence.seat = [], -1
        return pages

    def drop(self, pages: list[int]) -> None:
        """Give up ownership of pages; those without another owner become free."""
        for page in reversed(pages):
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            self._free_pages.append(page)
            if page in self._tainted:
                self._tainted.remove(page)
                for store in self.stores:
                    store.clear_page(page)

    def grow(self, sequence: Sequence) -> bool:
        """Allocate pages up to the front token; False when they run out on the way."""
        while len(sequence.pages) < self.pages_for(sequence.front + 1):
            if not self._free_pages:
                return False
            self._allocate(sequence)
        return True

    def _allocate(self, sequence: Sequence) -> None:
        page = self._free_pages.pop()
        self._num_owners[page] = 1
        self.page_table[sequence.seat, len(sequence.pages)] = page
        sequence.pages.append(page)
        if sequence.promised:
            sequence.promised -= 1
            self._num_promised -= 1

    def taint(self, pages: list[int]) -> None:
        """Zero these pages before they get another owner, because they may hold NaN.

        A masked key is multiplied by zero, and NaN would survive that in attention.
        """
        self._tainted.update(pages)

    def release(self, sequence: Sequence) -> None:
        """Take back seat, pages and promise of a resident sequence."""
        self.page_table[sequence.seat] = SCRATCH_PAGE
        self._num_promised -= sequence.promised
        self._free_seats.append(sequence.seat)
        self.drop(sequence.pages)
        sequence.pages, sequence.seat, sequence.promised = [], -1, 0

    def slot(self, sequence: Sequence, position: int) -> int:
        """Where position `position` of the sequence lives."""
        page, offset = divmod(position, self.page_size)
        return sequence.pages[page] * self.page_size + offset
