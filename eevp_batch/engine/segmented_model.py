"""A Hugging Face decoder cut at its exit layers.

The model's own embedding, layers, norms, rotary embedding and head run unchanged; attention goes
through `engine.attention`. One adapter serves the Llama family: Llama, SmolLM2, Mistral, Qwen2,
Qwen3. Knows packed tokens and the pool, nothing of sequences, exits or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eevp_batch.engine.attention import ATTENTION_NAME
from eevp_batch.engine.invariance import ROW_MULTIPLE
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.errors import ModelError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# These two choose their frequencies by the longest position in the batch, so that a row's output
# would depend on its batch mates.
REFUSED_ROPE_TYPES = ("dynamic", "longrope")


class SegmentOutput(NamedTuple):
    """States of the front tokens after a segment.

    Attributes:
        hidden: [B, E] after the segment's last layer.
        before: [B, E] before that layer.
    """

    hidden: torch.Tensor
    before: torch.Tensor


class SegmentedModel:
    """Runs one segment of a decoder over packed tokens.

    Args:
        model: a `...ForCausalLM` of a supported family, in evaluation mode. Its attention
            implementation is set to this package's.
        exit_layers: e_1 < ... < e_D = L.

    Raises:
        ModelError: unsupported family or rotary embedding, or exit layers that do not fit.
    """

    def __init__(self, model: PreTrainedModel, exit_layers: Sequence[int]) -> None:
        config = model.config
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            raise ModelError(
                f"model family: found {config.model_type!r}; allowed: "
                + ", ".join(SUPPORTED_MODEL_TYPES)
            )
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in REFUSED_ROPE_TYPES:
            raise ModelError(
                f"rope_type: found {rope_type!r}; allowed: types whose frequencies do not depend "
                "on the longest sequence of the batch"
            )
        self.num_layers: int = config.num_hidden_layers
        self.exit_layers = tuple(exit_layers)
        if (
            list(self.exit_layers) != sorted(set(self.exit_layers))
            or self.exit_layers[-1] != self.num_layers
            or self.exit_layers[0] < 1
        ):
            raise ModelError(
                f"exit layers: found {list(exit_layers)}; allowed: increasing layers, the last "
                f"one {self.num_layers}"
            )
        model.config._attn_implementation = ATTENTION_NAME
        self.config = config
        self.layers: Sequence[Any] = model.model.layers
        self._embed: nn.Embedding = model.model.embed_tokens
        self._norm: nn.Module = model.model.norm
        self._rotary: nn.Module = model.model.rotary_emb
        self._head: nn.Linear = model.lm_head
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = self.layers[0].self_attn.head_dim
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = self._head.weight.shape[0]

    @property
    def num_segments(self) -> int:
        """D."""
        return len(self.exit_layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, E]."""
        return self._head.weight

    def segment_layers(self, depth: int) -> range:
        """0-based indices of the layers that segment `depth` runs."""
        start = self.exit_layers[depth - 1] if depth else 0
        return range(start, self.exit_layers[depth])

    def run_segment(self, depth: int, tokens: PackedTokens, pool: KvPool) -> SegmentOutput:
        """Run packed tokens through segment `depth`.

        Reads the rows' states (their embeddings at depth 0), projects the keys/values of the tokens
        that left earlier, writes those of the rows, and leaves the rows' new states in the pool
        when a deeper segment could ask for them.

        Returns:
            The front tokens' states, [B, E] each, in the order of the pack's sequences.
        """
        if tokens.token_ids is not None:
            hidden = self._embed(tokens.token_ids)  # [N, E]
        else:
            hidden = pool.hidden.index_select(0, tokens.slots)
        rotary = self.rotary(tokens.positions, hidden)
        waiting = _WaitingStates(self, tokens, pool) if len(tokens.project_slots) else None
        before = hidden
        for index in self.segment_layers(depth):
            if waiting is not None:
                waiting.project(index)
            before = hidden
            hidden = self.layers[index](
                before[None], position_embeddings=rotary, layout=tokens.layout
            )[0]
        if depth + 1 < self.num_segments:
            real = slice(tokens.num_tokens)
            pool.hidden.index_copy_(0, tokens.slots[real], hidden[real])
        return SegmentOutput(
            hidden.index_select(0, tokens.front_rows), before.index_select(0, tokens.front_rows)
        )

    def rotary(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines [1, N, D] at positions [N], in the type of `like`."""
        out: tuple[torch.Tensor, ...] = self._rotary(like[None], position_ids=positions[None])
        return out

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
        layer = self.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (len(hidden), self.num_kv_heads, self.head_size)
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
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V] of the model's type."""
        rows = len(normed)
        padded = pad(normed, (0, 0, 0, -rows % ROW_MULTIPLE))
        out: torch.Tensor = self._head(padded)[:rows]
        return out


class _WaitingStates:
    """The tokens of a pack that are only projected: their states, read once for all layers."""

    def __init__(self, model: SegmentedModel, tokens: PackedTokens, pool: KvPool) -> None:
        self._model, self._pool, self._rows = model, pool, tokens.project_rows
        self._hidden = pool.hidden.index_select(0, tokens.project_slots)  # [W, E]
        self._rotary = model.rotary(tokens.project_positions, self._hidden)

    def project(self, index: int) -> None:
        """Write their keys/values of layer `index`."""
        key, value = self._model.project(index, self._hidden, self._rotary)
        self._pool.write(index, self._rows, key, value)
