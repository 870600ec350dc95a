"""A Hugging Face decoder cut at its exit layers.

One adapter serves the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen3. Layers run as
transformers wrote them (`ModuleLayers`), or on a CPU in a faster shape (`FusedLayers`). Knows
packed tokens and the pool, nothing of sequences, exits or sampling.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.bridges import Bridges
from eevp_batch.engine.fitted import FittedExits, unit_state
from eevp_batch.engine.fused import FusedLayers, can_fuse
from eevp_batch.engine.kv_cache import FirstStates, KvPool
from eevp_batch.engine.module_layers import ModuleLayers
from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.stored_weights import execution_device, present, settle
from eevp_batch.errors import FittedExitsError, ModelError

_log = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# These two choose their frequencies by the longest position in the batch, so that a row's output
# would depend on its batch mates.
REFUSED_ROPE_TYPES = ("dynamic", "longrope")


class SegmentOutput(NamedTuple):
    """States of the scored tokens after a segment; under most KV policies the front tokens.

    Attributes:
        hidden: [S, E] after the segment's last layer.
        before: [S, E] before that layer.
    """

    hidden: torch.Tensor
    before: torch.Tensor

    def part(self, rows: slice) -> SegmentOutput:
        """The states of some of the tokens."""
        return SegmentOutput(self.hidden[rows], self.before[rows])


class SegmentedModel:
    """Runs one segment of a decoder over packed tokens.

    Args:
        model: a `...ForCausalLM` of a supported family, in evaluation mode. Where its own modules
            run, their attention is set to this package's.
        exit_layers: e_1 < ... < e_D = L.
        kernel: lets the model's own modules run, with this attention; None: what is fastest.

    Raises:
        ModelError: unsupported family or rotary embedding, or exit layers that do not fit.
    """

    def __init__(
        self, model: PreTrainedModel, exit_layers: Sequence[int], kernel: Kernel | None = None
    ) -> None:
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
        self.exit_layers = self._checked(exit_layers)
        self.config = config
        self._eps: float = config.rms_norm_eps
        self._heads: dict[int, PackedLinear] = {}
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = model.model.layers[0].self_attn.head_dim
        self.hidden_size: int = config.hidden_size
        self.norm_eps: float = config.rms_norm_eps
        device = execution_device(model)
        objection = can_fuse(model, device) if kernel is None else f"attention by {kernel.name}"
        self.layers: FusedLayers | ModuleLayers
        if objection is None:
            with present(model.lm_head):  # copied, for it is gone with what was read
                self.head_weight: torch.Tensor = model.lm_head.weight.detach().clone()  # [V, E]
            self.layers = FusedLayers(model, self.head_weight)
        else:
            _log.info("layers run as transformers wrote them: %s", objection)
            settle(model, device)
            self.head_weight = model.lm_head.weight.detach()
            self.layers = ModuleLayers(model, kernel)
        self.vocab_size: int = self.head_weight.shape[0]
        with present(model.model.norm):
            self.norm_weight: torch.Tensor = model.model.norm.weight.detach().clone()  # [E]

    def _checked(self, exit_layers: Sequence[int]) -> tuple[int, ...]:
        if (
            list(exit_layers) != sorted(set(exit_layers))
            or exit_layers[-1] != self.num_layers
            or exit_layers[0] < 1
        ):
            raise ModelError(
                f"exit layers: found {list(exit_layers)}; allowed: increasing layers, the last "
                f"one {self.num_layers}"
            )
        return tuple(exit_layers)

    def recut(self, exit_layers: Sequence[int]) -> SegmentedModel:
        """The same layers, not copied, cut at other exit layers.

        Raises:
            ModelError: exit layers that do not fit.
        """
        other = copy.copy(self)
        other.exit_layers = self._checked(exit_layers)
        return other

    @property
    def num_segments(self) -> int:
        """D."""
        return len(self.exit_layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def can_record(self) -> bool:
        """Whether runs of decode-only packs can be recorded; see `attention.Kernel`."""
        return isinstance(self.layers, ModuleLayers) and self.layers.kernel.can_record

    def make_pool(self, num_pages: int, max_resident: int, max_pages: int) -> KvPool:
        """An empty pool for this model's keys, values and states; see `KvPool`."""
        return KvPool(
            num_pages=num_pages,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            max_resident=max_resident,
            max_pages=max_pages,
            dtype=self.dtype,
            device=self.device,
            hidden_dtype=self.layers.hidden_dtype,
            layout=self.layers.kv_layout,
            page_size=self.layers.page_size,
            first=self.first_states,
        )

    @property
    def first_states(self) -> FirstStates | None:
        """Where a pool keeps the states after the first exit layer for bridges that look back."""
        if self.layers.bridges is None or not self.layers.bridges.read_previous:
            return None
        # With one exit before the last layer nothing overwrites a state.
        return "hidden" if self.num_segments <= 2 else "own"

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
            The scored tokens' states, [S, E] each, in the order of the pack's sequences.
        """
        if tokens.token_ids is not None:
            hidden = self.layers.embed(tokens.token_ids)  # [N, E]
        else:
            hidden = pool.hidden.index_select(0, tokens.slots)
        hidden, before = self.layers.run(self.segment_layers(depth), hidden, tokens, pool)
        if depth + 1 < self.num_segments:
            real = slice(tokens.num_tokens)
            pool.hidden.index_copy_(0, tokens.slots[real], hidden[real])
            if depth == 0 and pool.first is not None and pool.first is not pool.hidden:
                pool.first.index_copy_(0, tokens.slots[real], hidden[real])
        return SegmentOutput(hidden.index_select(0, tokens.scored_rows), before)

    def use(self, fitted: FittedExits) -> None:
        """Let states go through fitted heads, and skipped layers get keys/values from bridges.

        Raises:
            FittedExitsError: they belong to a model of another shape.
        """
        found = (fitted.num_layers, fitted.hidden_size)
        if found != (self.num_layers, self.hidden_size):
            raise FittedExitsError(
                f"exit.heads: found exits of a model with {found[0]} layers of width {found[1]}; "
                f"allowed: {self.num_layers} layers of width {self.hidden_size}"
            )
        eye = torch.eye(self.hidden_size)
        self._heads = {
            layer: PackedLinear(
                (head.weight.float().cpu() + eye).to(self.device, self.dtype),
                head.bias.to(self.device, self.dtype),
            )
            for layer, head in fitted.heads.items()
        }
        if fitted.bridges:
            self.layers.bridges = Bridges(fitted, self.dtype, self.device, self._eps)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, [B, E] -> [B, E] in the model's type."""
        return self.layers.normed(hidden)

    def normed_at(self, exit_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the LM head reads at an exit, [B, E] -> [B, E]: the final norm of the state.

        Where a head is fitted, of u + A u + b, with u the unit state (tuned lens, arXiv
        2303.08112, section 3, on states of one scale).
        """
        head = self._heads.get(exit_layer)
        if head is not None:
            hidden = head(unit_state(hidden, self._eps).to(self.dtype)).to(hidden.dtype)
        return self.layers.normed(hidden)

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V] of the model's type."""
        return self.layers.scores(normed)
