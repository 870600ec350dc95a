"""Decoder layers as transformers wrote them, run over packed tokens: every device and number type.

Attention goes through `engine.attention`. Knows packed tokens and the pool, nothing of sequences,
exits or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eevp_batch.engine.attention import ATTENTION_NAME, Kernel
from eevp_batch.engine.bridges import Bridges, SkippingTokens
from eevp_batch.engine.decoder_part import DecoderPart
from eevp_batch.engine.invariance import to_multiple
from eevp_batch.engine.kernel_choice import choose_kernel
from eevp_batch.engine.kv_store import KvLayout, KvStore
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.paged_kernels import AttentionShape


class ModuleLayers:
    """Runs the model's own modules.

    Args:
        part: the model's layers, on their device; its attention implementation is set to this
            package's.
        kernel: what attends; None: what suits the model and its device.

    Attributes:
        bridges: what gives skipped layers their keys/values; None: those layers' projections.
    """

    padding = staticmethod(to_multiple)

    def __init__(self, part: DecoderPart, kernel: Kernel | None = None) -> None:
        part.config._attn_implementation = ATTENTION_NAME
        self._layers: Mapping[int, Any] = part.layers
        self._embed: nn.Embedding = part.embedding
        self._norm: nn.Module = part.norm
        self._rotary: nn.Module = part.rotary
        self._head: nn.Linear = part.head
        self.bridges: Bridges | None = None
        self.hidden_dtype: torch.dtype = part.head.weight.dtype
        self.kernel = kernel or choose_kernel(
            AttentionShape(
                device=part.device,
                dtype=self.hidden_dtype,
                num_heads=part.config.num_attention_heads,
                num_kv_heads=part.config.num_key_value_heads,
                head_size=part.layers[part.indices.start].self_attn.head_dim,
            )
        )
        self.kv_layout: KvLayout = self.kernel.kv_layout
        self.page_size = self.kernel.page_size

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """States [N, E] that ids [N] enter with."""
        out: torch.Tensor = self._embed(token_ids)
        return out

    def run(
        self, indices: range, hidden: torch.Tensor, tokens: PackedTokens, pool: KvStore
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layers `indices` (0-based) over hidden [N, E].

        Returns:
            The rows' states [N, E], and those of the front rows before the last layer, [B, E].
        """
        rotary = self._angles(tokens.positions, hidden)
        layout = self.kernel.layout(tokens, pool)
        waiting = _Waiting(self, tokens, pool) if len(tokens.project_slots) else None
        before = hidden
        for index in indices:
            if waiting is not None:
                waiting.project(index)
            before = hidden
            hidden = self._layers[index](before[None], position_embeddings=rotary, layout=layout)[0]
        return hidden, before.index_select(0, tokens.scored_rows)

    def kv_of(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What layer `index` (0-based) makes of states [N, E] before it: keys and values.

        Returns:
            [N, 2 * num_kv_heads * D], before key norm and rotary.
        """
        layer = self._layers[index]
        normed = layer.input_layernorm(hidden)
        return torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], dim=-1)

    def turned(
        self, index: int, keys: torch.Tensor, rotary: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Keys as they are kept: normed where the family does that, then rotated.

        Args:
            index: 0-based layer.
            keys: [W, num_kv_heads, D].
            rotary: cosines and sines [1, W, D].
        """
        return turned_keys(self._layers[index].self_attn, keys, rotary)[0].transpose(0, 1)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, which stands before the head at every exit, [B, E] -> [B, E]."""
        out: torch.Tensor = self._norm(hidden)
        return out

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V]."""
        rows = len(normed)
        padded = pad(normed, (0, 0, 0, to_multiple(rows) - rows))
        out: torch.Tensor = self._head(padded)[:rows]
        return out

    def _angles(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines [1, N, D] at positions [N], in the type of `like`."""
        out: tuple[torch.Tensor, ...] = self._rotary(like[None], position_ids=positions[None])
        return out


def turned_keys(
    attention: Any, keys: torch.Tensor, rotary: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Keys as an attention module makes them: normed where the family does that, then rotated.

    Args:
        attention: transformers' module.
        keys: [W, num_kv_heads, D].
        rotary: cosines and sines [1, W, D].

    Returns:
        [1, num_kv_heads, W, D].
    """
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    by_head = keys.transpose(0, 1)[None]
    turned: torch.Tensor = apply_rotary_pos_emb(by_head, by_head, *rotary)[1]
    return turned


class _Waiting:
    """The tokens of a pack that are only projected."""

    def __init__(self, layers: ModuleLayers, tokens: PackedTokens, pool: KvStore) -> None:
        self._layers, self._pool, self._slots = layers, pool, tokens.project_slots
        self._rotary = layers._angles(tokens.project_positions, pool.hidden)
        self._skipping = SkippingTokens(layers, tokens, pool)

    def project(self, index: int) -> None:
        """Write their keys/values of layer `index`."""
        projected = self._skipping.keys_values(index)
        keys, values = projected.view(len(projected), 2, self._pool.num_kv_heads, -1).unbind(1)
        keys = self._layers.turned(index, keys, self._rotary)
        self._pool.write(index, self._slots, keys, values)
