"""Keys, values and hidden states of one device: what lies in the pages.

A *slot* holds one token: its key and value in every layer of the device, and the hidden state that
it last had. Slots come in pages; who owns them is `kv_cache`'s to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy
import torch

PAGE_SIZE = 16
"""Tokens of a page, unless the attention kernel of a device wants another number."""
KvLayout = Literal["lane", "head", "token"]
"""How a page of keys and values lies in memory: [num_kv_heads, page_size, D] by `head`; the same
with keys [num_kv_heads, D, page_size] by `lane`, as the CPU kernels read it; and
[page_size, num_kv_heads, D] by `token`, as paged kernels on a GPU do."""
FirstStates = Literal["hidden", "own"]
"""Where the state after the first exit layer stays: with the one that a token waits with, or in a
place of its own."""
SCRATCH_PAGE = 0
"""Page 0 belongs to nobody: rows that only pad a batch write there."""


class KvStore:
    """The pages of one device.

    Args:
        num_pages: pages to hold, the scratch page apart.
        layers: 0-based layers whose keys and values are here.
        num_kv_heads: heads of keys and values.
        head_size: D.
        hidden_size: E.
        dtype: of keys and values.
        device: where they are.
        hidden_dtype: of hidden states.
        layout: how a page lies in memory.
        page_size: tokens of a page.
        first: where states after the first exit layer stay; None: nobody asks for them.

    Attributes:
        page_table: [max_resident + 1, max_pages] int64 in host memory, whatever the device; unused
            entries point at the scratch page. A step sends the rows that it needs.
        deeper: the stores of the devices that tokens come to later.
    """

    page_table: torch.Tensor

    def __init__(
        self,
        num_pages: int,
        layers: Sequence[int],
        num_kv_heads: int,
        head_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        hidden_dtype: torch.dtype,
        layout: KvLayout = "head",
        page_size: int = PAGE_SIZE,
        first: FirstStates | None = None,
    ) -> None:
        num_slots = (num_pages + 1) * page_size
        self.num_pages, self.page_size, self.device = num_pages, page_size, device
        self.num_kv_heads, self._head_size, self._layout = num_kv_heads, head_size, layout
        self._heads = torch.arange(num_kv_heads, device=device)
        # By layer, num_pages + 1 pages, flat.
        size = num_slots * num_kv_heads * head_size
        self.keys = {layer: _zeros(size, dtype, device) for layer in layers}
        self.values = {layer: _zeros(size, dtype, device) for layer in layers}
        self.pointers = {
            layer: (self.keys[layer].data_ptr(), self.values[layer].data_ptr()) for layer in layers
        }
        # [num_slots, E]
        self.hidden = _zeros(num_slots * hidden_size, hidden_dtype, device).view(num_slots, -1)
        self.first = None if first is None else self.hidden  # [num_slots, E]
        if first == "own":
            self.first = torch.zeros_like(self.hidden)
        self.deeper: list[KvStore] = []

    # --- hidden states ---------------------------------------------------------------------------

    def keep(self, slots: torch.Tensor, hidden: torch.Tensor, is_first: bool) -> None:
        """Leave states [N, E] at slots [N].

        Args:
            slots: on any device.
            hidden: on any device, of any float type.
            is_first: whether these are the states after the first exit layer.
        """
        hidden = hidden.to(self.hidden.device, self.hidden.dtype)
        slots = slots.to(self.device)
        self.hidden.index_copy_(0, slots, hidden)
        if is_first and self.first is not None and self.first is not self.hidden:
            self.first.index_copy_(0, slots, hidden)

    def states_before(self, slots: torch.Tensor) -> torch.Tensor | None:
        """States after the first exit layer at slots [W], zeros at slot 0; [W, E].

        None where they are not kept.
        """
        if self.first is None:
            return None
        return self.first.index_select(0, slots).masked_fill_((slots == 0)[:, None], 0.0)

    # --- pages -----------------------------------------------------------------------------------

    def copy_page(self, target: int, source: int) -> None:
        """Copy all that a page holds."""
        for store in self._by_page():
            store[target] = store[source]

    def clear_page(self, page: int) -> None:
        """Zero all that a page holds."""
        for store in self._by_page():
            store[page] = 0

    def _by_page(self) -> list[torch.Tensor]:
        """Everything that lies in pages, [num_pages + 1, ...] each."""
        states = [self.hidden]
        if self.first is not None and self.first is not self.hidden:
            states.append(self.first)
        stores = [*self.keys.values(), *self.values.values(), *states]
        return [store.view(self.num_pages + 1, -1) for store in stores]

    # --- keys and values -------------------------------------------------------------------------

    def write(
        self, layer_index: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store keys (after rotary) and values, both [N, num_kv_heads, D], at slots [N]."""
        if self._layout == "token":  # one kernel each, whatever the heads
            for store, part in zip(self.by_page(layer_index), (key, value), strict=True):
                store.flatten(0, 1).index_copy_(0, slots, part)
            return
        index = self._elements(slots)
        keys, values = self._by_head(layer_index)
        keys[index] = key
        values[index] = value

    def tokens(self, layer_index: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values at slots [N], both [N, num_kv_heads, D]."""
        index = self._elements(slots)
        keys, values = self._by_head(layer_index)
        return keys[index], values[index]

    def by_page(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they lie by `token`, [num_pages + 1, page_size, num_kv_heads, D]."""
        shape = (self.num_pages + 1, self.page_size, self.num_kv_heads, self._head_size)
        return self.keys[layer_index].view(shape), self.values[layer_index].view(shape)

    def read(self, layer_index: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of whole pages [B, P].

        Returns:
            Two contiguous tensors [B, num_kv_heads, P * page_size, D].
        """
        batch, columns = pages.shape
        rows = pages[:, None, :] * self.num_kv_heads + self._heads[None, :, None]
        keys, values = (
            store.flatten(0, 1).index_select(0, rows.flatten())
            for store in self._by_head(layer_index)
        )
        shape = (batch, self.num_kv_heads, columns * self.page_size, self._head_size)
        return keys.reshape(shape), values.reshape(shape)

    def _elements(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index of the tokens at slots [N] in what `_by_head` gives."""
        column = slots[:, None]
        return column // self.page_size, self._heads[None], column % self.page_size

    def _by_head(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [num_pages + 1, num_kv_heads, page_size, D] of a layer's keys and values."""
        if self._layout == "token":
            keys, values = self.by_page(layer_index)
            return keys.transpose(1, 2), values.transpose(1, 2)
        stem = (self.num_pages + 1, self.num_kv_heads)
        values = self.values[layer_index].view(*stem, self.page_size, self._head_size)
        keys = self.keys[layer_index]
        if self._layout == "lane":
            return keys.view(*stem, self._head_size, self.page_size).transpose(2, 3), values
        return keys.view(*stem, self.page_size, self._head_size), values


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [size], for even a masked key must be finite.

    On the CPU they come from `calloc`, so that memory nobody writes is never touched;
    `torch.zeros` would touch all of it.
    """
    if device.type != "cpu":
        # Never an inference tensor, wherever it is made: compiled kernels tell the two apart.
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(numpy.zeros(size * dtype.itemsize, dtype=numpy.uint8)).view(dtype)
