"""Decoder layers as transformers wrote them, run over packed tokens: every device and number type.

Attention goes through `engine.attention`. Knows packed tokens and the pool, nothing of sequences,
exits or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eevp_batch.engine.attention import ATTENTION_NAME, Kernel
from eevp_batch.engine.invariance import ROW_MULTIPLE
from eevp_batch.engine.kernel_choice import choose_kernel
from eevp_batch.engine.kv_cache import KvLayout, KvPool
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.paged_kernels import AttentionShape


class ModuleLayers:
    """Runs the model's own modules.

    Args:
        model: a `...ForCausalLM`; its attention implementation is set to this package's.
        kernel: what attends; None: what suits the model and its device.
    """

    row_multiple = ROW_MULTIPLE

    def __init__(self, model: PreTrainedModel, kernel: Kernel | None = None) -> None:
        model.config._attn_implementation = ATTENTION_NAME
        self._layers: Sequence[Any] = model.model.layers
        self._embed: nn.Embedding = model.model.embed_tokens
        self._norm: nn.Module = model.model.norm
        self._rotary: nn.Module = model.model.rotary_emb
        self._head: nn.Linear = model.lm_head
        self._num_kv_heads: int = model.config.num_key_value_heads
        self.hidden_dtype: torch.dtype = model.lm_head.weight.dtype
        self.kernel = kernel or choose_kernel(
            AttentionShape(
                device=model.lm_head.weight.device,
                dtype=self.hidden_dtype,
                num_heads=model.config.num_attention_heads,
                num_kv_heads=self._num_kv_heads,
                head_size=self._layers[0].self_attn.head_dim,
            )
        )
        self.kv_layout: KvLayout = self.kernel.kv_layout
        self.page_size = self.kernel.page_size

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """States [N, E] that ids [N] enter with."""
        out: torch.Tensor = self._embed(token_ids)
        return out

    def run(
        self, indices: range, hidden: torch.Tensor, tokens: PackedTokens, pool: KvPool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layers `indices` (0-based) over hidden [N, E].

        Returns:
            The rows' states [N, E], and those of the front rows before the last layer, [B, E].
        """
        rotary = self._angles(tokens.positions, hidden)
        layout = self.kernel.layout(tokens, pool)
        skipped = None
        if len(tokens.project_slots):
            skipped = pool.hidden.index_select(0, tokens.project_slots)  # [W, E]
            skipped_rotary = self._angles(tokens.project_positions, skipped)
        before = hidden
        for index in indices:
            if skipped is not None:
                key, value = self.project(index, skipped, skipped_rotary)
                pool.write(index, tokens.project_slots, key, value)
            before = hidden
            hidden = self._layers[index](before[None], position_embeddings=rotary, layout=layout)[0]
        return hidden, before.index_select(0, tokens.scored_rows)

    def project(
        self, index: int, hidden: torch.Tensor, rotary: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that layer `index` would give to states that skipped it.

        The state that a token left with is taken for the state before the layer (CALM, section
        3.4; the paper's `propagate`): the layer's own norm and projections, then rotary.

        Args:
            index: 0-based layer.
            hidden: [W, E].
            rotary: cosines and sines [1, W, D].

        Returns:
            Keys and values [W, num_kv_heads, D].
        """
        layer = self._layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (len(hidden), self._num_kv_heads, -1)
        key = attention.k_proj(normed).view(shape)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key = key.transpose(0, 1)[None]  # [1, num_kv_heads, W, D]
        _, key = apply_rotary_pos_emb(key, key, *rotary)
        return key[0].transpose(0, 1), attention.v_proj(normed).view(shape)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, which stands before the head at every exit, [B, E] -> [B, E]."""
        out: torch.Tensor = self._norm(hidden)
        return out

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V]."""
        rows = len(normed)
        padded = pad(normed, (0, 0, 0, -rows % ROW_MULTIPLE))
        out: torch.Tensor = self._head(padded)[:rows]
        return out

    def _angles(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines [1, N, D] at positions [N], in the type of `like`."""
        out: tuple[torch.Tensor, ...] = self._rotary(like[None], position_ids=positions[None])
        return out
