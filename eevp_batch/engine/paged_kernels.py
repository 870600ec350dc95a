"""Attention that reads pages where they lie: torch's own paged kernels.

A pack is taken as *runs*: rows of one sequence at consecutive positions, so that the last row of a
run sees the keys up to its own position and each row before it one key less. Rows that only pad a
pack are runs of their own, which look at the scratch page.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from eevp_batch.engine.attention import Layout
from eevp_batch.engine.kv_store import SCRATCH_PAGE, KvLayout, KvStore
from eevp_batch.engine.packing import Lookup, PackedTokens, Span
from eevp_batch.engine.upload import moved

VARLEN_PAGE = 256
"""FlashAttention 2 in torch takes pages of multiples of 256 tokens."""
FLEX_PAGE = 128
"""FlexAttention's own block of keys."""
FLEX_ROWS = 128
"""Rows of queries that FlexAttention takes at once."""
FLEX_HEAD_SIZE = 16
"""FlexAttention on a GPU takes no smaller heads."""


class AttentionShape(NamedTuple):
    """What decides which kernel can be used.

    Attributes:
        device: where the model is.
        dtype: of keys and values.
        num_heads: H.
        num_kv_heads: heads of keys and values.
        head_size: D.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_size: int


# --- which rows look where -----------------------------------------------------------------------


def look_up(tokens: PackedTokens, pool: KvStore, most_rows: int | None = None) -> Lookup:
    """The runs of a pack, none longer than `most_rows`; one copy to the device."""
    starts, seats, lengths = [0], [], []
    for span in tokens.spans:
        for stop in _stops(span, most_rows):
            seats.append(span.seat)
            lengths.append(span.positions[stop - 1] + 1)
            starts.append(span.start + stop)
    num_padding = tokens.num_rows - tokens.num_tokens
    starts += range(tokens.num_tokens + 1, tokens.num_rows + 1)
    lengths += [1] * num_padding
    # Two columns at least: a compiled kernel for one would be another one.
    width = max([2, *(len(span.pages) for span in tokens.spans)])
    tables = torch.full((len(lengths), width), SCRATCH_PAGE, dtype=torch.int32)
    pages = pool.page_table[torch.tensor(seats, dtype=torch.int64), :width]
    tables[: len(seats), : pages.shape[1]] = pages  # a small pool's table may be narrower
    columns = torch.tensor(starts + lengths, dtype=torch.int32)
    sent = moved(torch.cat([columns, tables.flatten()]), pool.device)
    parts = torch.split(sent, [len(starts), len(lengths), tables.numel()])
    longest = max(stop - start for start, stop in pairwise(starts))
    return Lookup(parts[0], parts[1], parts[2].view(tables.shape), longest)


def _stops(span: Span, most_rows: int | None) -> Iterator[int]:
    """Where the runs of a span end, counted from its first row."""
    begin, positions = 0, span.positions
    for stop in range(1, len(positions)):
        if positions[stop] != positions[stop - 1] + 1 or stop - begin == most_rows:
            yield stop
            begin = stop
    yield len(positions)


# --- FlashAttention with block tables ------------------------------------------------------------


class Varlen:
    """`torch.nn.attention.varlen.varlen_attn` with block tables, there from torch 2.12 on.

    Args:
        run: that function, or another with its arguments.
    """

    name = "FlashAttention with block tables"
    kv_layout: KvLayout = "token"
    page_size = VARLEN_PAGE
    can_record = True

    def __init__(self, run: Callable[..., Any] = varlen.varlen_attn) -> None:
        self._run = run

    @staticmethod
    def objection(shape: AttentionShape) -> str | None:
        """Why it cannot be used; None when it can be tried."""
        needed = {"block_table", "seqused_k", "num_splits", "enable_gqa"}
        if not needed <= set(inspect.signature(varlen.varlen_attn).parameters):
            return f"torch {torch.__version__} has no block tables in varlen_attn"
        if shape.dtype not in (torch.bfloat16, torch.float16):
            return f"no FlashAttention for {shape.dtype}"
        if shape.head_size % 8 or shape.head_size > 256:
            return f"no FlashAttention for heads of {shape.head_size}"
        return None

    def layout(self, tokens: PackedTokens, pool: KvStore) -> Layout:
        """See `Kernel`."""
        return _VarlenLayout(self._run, tokens, pool, tokens.lookup or look_up(tokens, pool))


class _VarlenLayout:
    def __init__(
        self, run: Callable[..., Any], tokens: PackedTokens, pool: KvStore, lookup: Lookup
    ) -> None:
        self._run, self._lookup = run, lookup
        self.pool, self.slots = pool, tokens.slots
        self._max_keys = lookup.tables.shape[1] * pool.page_size
        # Asked for, and not looked at where there is a block table.
        numbers = torch.arange(len(lookup.starts), dtype=torch.int32, device=pool.device)
        self._key_starts = numbers * self._max_keys

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        keys, values = self.pool.by_page(layer_index)
        if window is not None:
            window_size = (window - 1, 0)
        else:
            # A single row sees all keys anyway, and without a mask the heads that share keys are
            # taken together.
            window_size = (-1, -1) if self._lookup.longest == 1 else (-1, 0)
        out: torch.Tensor = self._run(
            query[0].transpose(0, 1),
            keys,
            values,
            self._lookup.starts,
            self._key_starts,
            self._lookup.longest,
            self._max_keys,
            scale=scaling,
            window_size=window_size,
            enable_gqa=True,
            seqused_k=self._lookup.lengths,
            block_table=self._lookup.tables,
            # Any other number leaves rows unwritten (pytorch issue 194167), and makes a row depend
            # on the longest of its batch mates.
            num_splits=1,
        )
        return out


# --- FlexAttention over the whole pool -----------------------------------------------------------


class Flex:
    """FlexAttention: the pool is one long sequence of keys, of which each run sees its own pages.

    The query heads that share a key head are taken as rows of that head, so that the kernel reads
    keys and values once for them.

    Args:
        group: H / num_kv_heads.
        run: `flex_attention`, compiled or not.
    """

    name = "FlexAttention over pages"
    kv_layout: KvLayout = "token"
    page_size = FLEX_PAGE
    can_record = True

    def __init__(self, group: int, run: Callable[..., Any] | None = None) -> None:
        self._most_rows = max(1, FLEX_ROWS // group)
        # With `fullgraph` too many recompilations are an error, not a silent pass over all pages.
        self._run = run or torch.compile(flex_attention, fullgraph=True)

    @staticmethod
    def objection(shape: AttentionShape) -> str | None:
        """Why it cannot be used; None when it can be tried."""
        if shape.head_size < FLEX_HEAD_SIZE:
            return f"no FlexAttention for heads of {shape.head_size}"
        return None

    def layout(self, tokens: PackedTokens, pool: KvStore) -> FlexLayout:
        """See `Kernel`."""
        lookup = tokens.lookup or look_up(tokens, pool, self._most_rows)
        return FlexLayout(self._run, tokens, pool, lookup, self._most_rows)


class FlexLayout:
    """What FlexAttention needs; R runs of Q rows, short ones filled up with their first row.

    Q is 1 where all runs are single rows, else `most_rows`: it is compiled in, R is not. (A number
    of queries that is not compiled in makes torch 2.13 write wrong code for a CPU.)

    Args:
        run: `flex_attention`, compiled or not.
        tokens: the pack.
        pool: keys and values by `token`.
        lookup: runs of at most `most_rows` rows.
        most_rows: `FLEX_ROWS` / group.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        tokens: PackedTokens,
        pool: KvStore,
        lookup: Lookup,
        most_rows: int,
    ) -> None:
        self._run, self._lookup = run, lookup
        self.pool, self.slots = pool, tokens.slots
        starts, stops = lookup.starts[:-1, None], lookup.starts[1:, None]
        num_rows = 1 if lookup.longest == 1 else most_rows
        offsets = torch.arange(num_rows, dtype=torch.int32, device=pool.device)
        rows = starts + offsets
        self._rows = torch.where(rows < stops, rows, starts)  # [R, Q] row of the pack
        self._positions = tokens.positions[self._rows]  # [R, Q]
        numbers = torch.arange(tokens.num_rows, dtype=torch.int32, device=pool.device)
        run_of = torch.searchsorted(stops.flatten(), numbers, right=True)
        self._places = run_of * num_rows + numbers - lookup.starts[run_of]  # [N] in [R * Q]
        self._masks: dict[tuple[int, int | None], BlockMask] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `Layout`."""
        num_heads, head_size = query.shape[1], query.shape[3]
        num_kv_heads = key.shape[1]
        num_runs, num_rows = self._rows.shape
        group = num_heads // num_kv_heads
        shape = (num_runs, num_rows, num_kv_heads, group, head_size)
        grouped = query[0].transpose(0, 1)[self._rows].view(shape).transpose(1, 2)
        keys, values = (
            store.flatten(0, 1).transpose(0, 1)[None]  # [1, num_kv_heads, num_slots, D]
            for store in self.pool.by_page(layer_index)
        )
        grouped = grouped.reshape(num_runs, num_kv_heads, num_rows * group, head_size)
        torch._dynamo.mark_static(grouped, 2)
        out: torch.Tensor = self._run(
            grouped,
            keys,
            values,
            block_mask=self.block_mask(group, window),
            scale=scaling,
        )
        out = out.view(num_runs, num_kv_heads, num_rows, group, head_size).transpose(1, 2)
        return out.reshape(-1, num_heads, head_size)[self._places]

    def block_mask(self, group: int, window: int | None) -> BlockMask:
        """Which pages each run reads, and which of their keys each row sees.

        Args:
            group: rows of queries that each row of the pack brings.
            window: positions that a row may look back, itself included; None: all.
        """
        name = (group, window)
        if name not in self._masks:
            size, tables = self.pool.page_size, self._lookup.tables
            num_pages = (self._lookup.lengths + size - 1) // size
            self._masks[name] = BlockMask.from_kv_blocks(
                num_pages[:, None, None],
                tables[:, None, None],
                BLOCK_SIZE=(FLEX_ROWS, size),
                mask_mod=self._mask(group, window),
                seq_lengths=(self._rows.shape[1] * group, (self.pool.num_pages + 1) * size),
                compute_q_blocks=False,  # only a backward pass needs them
            )
        return self._masks[name]

    def _mask(self, group: int, window: int | None) -> Callable[..., torch.Tensor]:
        """Whether run b's row q sees the key in slot k.

        No number is captured, only tensors: a number would be compiled in.
        """
        size, tables = self.pool.page_size, self._lookup.tables
        last = self._positions.repeat_interleave(group, dim=1)  # [R, Q * group]
        first = torch.zeros_like(last) if window is None else last - window + 1
        pages = torch.arange(self.pool.num_pages + 1, dtype=torch.int32, device=last.device)
        # A page is the n-th page of all its owners. Unused entries of a table name the scratch
        # page, which has to be the first of the rows that pad.
        columns = torch.zeros_like(pages)
        nth = torch.arange(tables.shape[1], dtype=torch.int32, device=last.device)
        columns.scatter_(0, tables.flatten().long(), nth.repeat(len(tables)))
        columns[:1] = 0
        page_of, column_of = pages.repeat_interleave(size), columns.repeat_interleave(size)
        offset = torch.arange(size, dtype=torch.int32, device=last.device).repeat(len(pages))
        position_of = column_of * size + offset  # [num_slots]

        def is_visible(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
        ) -> torch.Tensor:
            is_own = tables[b, column_of[k]] == page_of[k]
            return is_own & (position_of[k] <= last[b, q]) & (position_of[k] >= first[b, q])

        return is_visible
