"""Decoder layers of the Llama family on a CPU: packed products, and one kernel between two of them.

The same arithmetic as transformers' layers, held to them by tests, in another shape: query, key and
value share one product, gate and up another, weights lie as oneDNN wants them, and everything
between two products is one pass of `native/kernels.c`. The residual stream stays in float32 within
and between segments, also for bfloat16 weights. A row's result does not depend on the other rows.

Knows packed tokens and the pool, nothing of sequences, exits or sampling.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from eevp_batch.engine import native
from eevp_batch.engine.bridges import Bridges, SkippingTokens
from eevp_batch.engine.decoder_part import DecoderPart
from eevp_batch.engine.host_memory import let_freed_memory_go
from eevp_batch.engine.kv_store import PAGE_SIZE, KvLayout, KvStore
from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.row_sizes import to_size
from eevp_batch.engine.stored_weights import present, settle

BLOCK_ROWS = 4
"""Rows of one sequence that attention takes at once, so that a key is read once for them."""


class FusedLayer:
    """Weights of one layer. `layer` is transformers' own; its weights are copied.

    Products are laid out one by one, the largest first: what one takes beside the model while that
    is done is over before the others are there.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.gate_up = _stacked(mlp.gate_proj, mlp.up_proj)
        self.down = _stacked(mlp.down_proj)
        self.qkv = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _stacked(attention.o_proj)
        self.kv = _stacked(attention.k_proj, attention.v_proj)
        self.input_norm = _float_copy(layer.input_layernorm)
        self.middle_norm = _float_copy(layer.post_attention_layernorm)
        self.q_norm = _float_copy(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = _float_copy(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.window: int = _window(attention)
        self.scaling: float = attention.scaling


def _float_copy(norm: nn.Module) -> torch.Tensor:
    """A norm's weight in float32. Copied: a tensor of a mapped file keeps all of it in memory."""
    with present(norm):
        weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        return weight.detach().to(torch.float32, copy=True)


def _window(attention: Any) -> int:
    """Positions that a token may look back; 0 without a limit. Mistral keeps it in its config."""
    is_mistral = attention.config.model_type == "mistral"
    owner = attention.config if is_mistral else attention
    return getattr(owner, "sliding_window", None) or 0


def _stacked(*parts: nn.Linear) -> PackedLinear:
    """Several products of the same rows as one; of what is read, one part at a time is there."""
    rows = [part.out_features for part in parts]
    like = parts[0].weight
    weight = torch.empty(sum(rows), parts[0].in_features, dtype=like.dtype)
    bias = None if parts[0].bias is None else torch.empty(sum(rows), dtype=like.dtype)
    biases = [None] * len(parts) if bias is None else torch.split(bias, rows)
    for part, own_weight, own_bias in zip(parts, torch.split(weight, rows), biases, strict=True):
        with present(part):
            own_weight.copy_(part.weight.detach())
            if own_bias is not None:
                own_bias.copy_(part.bias.detach())
    return PackedLinear(weight, bias)


def _head(part: DecoderPart, weight: torch.Tensor) -> PackedLinear:
    """The product with the head, laid out from what is read for that: it looks at every page."""
    with present(part.head):
        head = PackedLinear(part.head.weight)
    return head if head.is_laid_out else PackedLinear(weight)


def can_fuse(part: DecoderPart) -> str | None:
    """Why a model's layers cannot run here on their device; None when they can."""
    config, dtype = part.config, part.head.weight.dtype
    attention = part.layers[part.indices.start].self_attn
    if part.device.type != "cpu":
        return f"device {part.device.type}"
    if native.kernels(dtype) is None:
        return f"no kernels for {dtype}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if attention.head_dim % 8 or attention.head_dim > 256:
        return f"head size {attention.head_dim}"
    if config.hidden_size % 16 or config.intermediate_size % 16:
        return f"widths {config.hidden_size}, {config.intermediate_size}"
    return None


class FusedLayers:
    """Runs layers over packed tokens.

    Args:
        part: layers to which `can_fuse` has no objection; what is needed of it is copied.
        head_weight: of its head, for good.

    Attributes:
        bridges: what gives skipped layers their keys/values; None: those layers' projections.
    """

    hidden_dtype = torch.float32
    kv_layout: KvLayout = "lane"
    page_size = PAGE_SIZE
    padding = staticmethod(to_size)

    def __init__(self, part: DecoderPart, head_weight: torch.Tensor) -> None:
        config = part.config
        kernels = native.kernels(head_weight.dtype)
        if kernels is None:
            raise ValueError(f"no kernels for {head_weight.dtype}")
        self._kernels = kernels
        self._dtype: torch.dtype = head_weight.dtype
        self._eps: float = config.rms_norm_eps
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_size: int = part.layers[part.indices.start].self_attn.head_dim
        self._rotary: nn.Module = part.rotary
        settle(self._rotary, part.device)
        self._embed = head_weight
        if part.embedding is not None and not part.is_tied:
            self._embed = part.embedding_weight()
        self._final_norm: torch.Tensor = _float_copy(part.norm)
        # Before the layers: none is as large, and what is read of it would come on top of them all.
        self._head = _head(part, head_weight)
        self._layers: dict[int, FusedLayer] = {}
        for index, layer in part.layers.items():
            self._layers[index] = FusedLayer(layer)
            let_freed_memory_go()
        self._scratch: dict[str, torch.Tensor] = {}
        self.bridges: Bridges | None = None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """States [N, E] float32 that ids [N] enter with."""
        return self._embed.index_select(0, token_ids).float()

    def run(
        self, indices: range, hidden: torch.Tensor, tokens: PackedTokens, pool: KvStore
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layers `indices` (0-based) over hidden [N, E], which is overwritten.

        Returns:
            The rows' states [N, E], and those of the front rows before the last layer, [B, E].
        """
        attention = self._attention(tokens, pool)
        waiting = _Waiting(self, tokens, pool) if len(tokens.project_slots) else None
        delta: torch.Tensor | None = None
        before = hidden
        for index in indices:
            if waiting is not None:
                waiting.project(index)
            layer = self._layers[index]
            normed = self._norm(hidden, delta, layer.input_norm, "normed")
            if index == indices[-1]:
                before = hidden.index_select(0, tokens.scored_rows)
            self._call(index, layer.qkv(normed), attention)
            normed = self._norm(hidden, layer.out(attention.out), layer.middle_norm, "normed")
            delta = layer.down(self._silu_mul(layer.gate_up(normed)))
        if delta is not None:
            self._kernels.eevp_add(hidden.data_ptr(), delta.data_ptr(), hidden.numel())
        return hidden, before

    def kv_of(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What layer `index` (0-based) makes of states [N, E] before it: keys and values.

        Returns:
            [N, 2 * num_kv_heads * D], before key norm and rotary.
        """
        layer = self._layers[index]
        return layer.kv(self._norm(hidden.contiguous(), None, layer.input_norm, "waiting"))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, [B, E] float32 -> [B, E] in the weights' type."""
        return self._norm(hidden.contiguous(), None, self._final_norm, None)

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V] in the weights' type."""
        return self._head(normed)

    # --- between the products --------------------------------------------------------------------

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of scratch memory that grows and stays."""
        kept = self._scratch.get(name)
        if kept is None or kept.numel() < rows * width:
            kept = self._scratch[name] = torch.empty(rows * width, dtype=dtype)
        return kept[: rows * width].view(rows, width)

    def _norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, buffer: str | None
    ) -> torch.Tensor:
        """Add `delta` to x in place, then its norm."""
        rows, width = x.shape
        if buffer is None:
            out = torch.empty(rows, width, dtype=self._dtype)
        else:
            out = self._buffer(buffer, rows, width, self._dtype)
        self._kernels.eevp_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            self._eps,
            out.data_ptr(),
            rows,
            width,
        )
        return out

    def _silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = self._buffer("activated", rows, width, self._dtype)
        self._kernels.eevp_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    def _attention(self, tokens: PackedTokens, pool: KvStore) -> _Attention:
        """The attention call of the rows of a pack."""
        rows, width = tokens.num_rows, self._num_heads * self._head_size
        blocks, seats = _blocks(tokens)
        call = _Attention(self, pool, tokens.positions, tokens.slots)
        call.look(
            blocks=blocks,
            seats=seats,
            queries=self._buffer("queries", rows, width, torch.float32),
            out=self._buffer("mixed", rows, width, self._dtype),
            num_heads=self._num_heads,
        )
        return call

    def _call(self, index: int, projected: torch.Tensor, attention: _Attention) -> None:
        """Write the rows' keys/values of layer `index`, and attend where they look."""
        layer, fields = self._layers[index], attention.fields
        fields.qkv = projected.data_ptr()
        fields.keys, fields.values = attention.pool.pointers[index]
        fields.q_norm = None if layer.q_norm is None else layer.q_norm.data_ptr()
        fields.k_norm = None if layer.k_norm is None else layer.k_norm.data_ptr()
        fields.window, fields.scaling = layer.window, layer.scaling
        self._kernels.eevp_attention(ctypes.byref(fields))


class _Attention:
    """What the attention kernel is told of a pack's rows, the same for every layer of a segment.

    The kernel gets addresses; the tensors behind them live as long as this does. Until `look` the
    rows bring keys and values only, and nothing attends.

    Attributes:
        fields: the structure that the kernel reads.
        out: [N, H * D] what it writes.
    """

    out: torch.Tensor

    def __init__(
        self, layers: FusedLayers, pool: KvStore, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        like = torch.empty(1, dtype=torch.float32)  # so that angles are float32, [1, N, D]
        cosine, sine = layers._rotary(like, position_ids=positions[None])
        self.pool = pool
        self._alive = {
            "cosine": cosine[0].contiguous(),
            "sine": sine[0].contiguous(),
            "positions": positions,
            "slots": slots,
        }
        self.fields = native.Attention(
            **{name: tensor.data_ptr() for name, tensor in self._alive.items()},
            num_rows=len(positions),
            num_kv_heads=layers._num_kv_heads,
            head_size=layers._head_size,
            eps=layers._eps,
        )

    def look(
        self,
        blocks: torch.Tensor,
        seats: torch.Tensor,
        queries: torch.Tensor,
        out: torch.Tensor,
        num_heads: int,
    ) -> None:
        """Let the rows attend; see `_blocks` for the first two, the others are [N, H * D]."""
        self.out, table = out, self.pool.page_table
        looking = {"blocks": blocks, "seats": seats, "queries": queries, "out": out}
        for name, tensor in (looking | {"page_table": table}).items():
            setattr(self.fields, name, tensor.data_ptr())
        self._alive |= looking
        self.fields.num_blocks, self.fields.num_heads = len(blocks) - 1, num_heads
        self.fields.table_width = table.shape[1]


def _blocks(tokens: PackedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """How attention walks a pack.

    Returns:
        First rows of the blocks that it takes at once, [num_blocks + 1] int32, and the row of the
        page table of each pack row, [N] int64.
    """
    starts: list[int] = []
    seats = [0] * tokens.num_rows
    for span in tokens.spans:
        starts += range(span.start, span.stop, BLOCK_ROWS)
        seats[span.start : span.stop] = [span.seat] * (span.stop - span.start)
    starts.append(tokens.num_tokens)
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(seats, dtype=torch.int64)


class _Waiting:
    """The tokens of a pack that are only projected."""

    def __init__(self, layers: FusedLayers, tokens: PackedTokens, pool: KvStore) -> None:
        self._layers = layers
        self._attention = _Attention(layers, pool, tokens.project_positions, tokens.project_slots)
        self._skipping = SkippingTokens(layers, tokens, pool)

    def project(self, index: int) -> None:
        """Write their keys/values of layer `index`."""
        self._layers._call(index, self._skipping.keys_values(index), self._attention)
