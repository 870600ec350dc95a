"""A Hugging Face decoder cut at its exit layers.

One adapter serves the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen3. Layers run as
transformers wrote them (`ModuleLayers`), or on a CPU in a faster shape (`FusedLayers`). Knows
packed tokens and the pool, nothing of sequences, exits or sampling.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.bridges import Bridges
from eevp_batch.engine.decoder_part import DecoderPart
from eevp_batch.engine.devices import Device
from eevp_batch.engine.exit_heads import LaidOutHead
from eevp_batch.engine.fitted import FittedExits, unit_state
from eevp_batch.engine.fused import FusedLayers, can_fuse
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.kv_store import FirstStates, KvStore
from eevp_batch.engine.module_layers import ModuleLayers
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.stored_weights import execution_device, present
from eevp_batch.errors import FittedExitsError, ModelError, UsageError

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
    """Runs segments of a decoder over packed tokens: all of them, or those of one device.

    Args:
        model: a `...ForCausalLM` of a supported family, in evaluation mode. Where its own modules
            run, their attention is set to this package's.
        exit_layers: e_1 < ... < e_D = L.
        kernel: lets the model's own modules run, with this attention; None: what is fastest.
        device: where they run; None: where the model is.
        layers: 0-based layers of this device; None: all of them.

    Attributes:
        exit_layers: layers that segments end after, the borders between devices among them.
        borders: 0-based segments that end where a device does and no token may leave.
        place: its device.
        parts: of all devices, in the order in which tokens come by; itself where it is all.
        run_lock: held by whoever runs something here, for layers have memory of their own.

    Raises:
        ModelError: unsupported family or rotary embedding, or exit layers that do not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        exit_layers: Sequence[int],
        kernel: Kernel | None = None,
        device: Device | None = None,
        layers: range | None = None,
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
        self._heads: dict[int, LaidOutHead] = {}
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = model.model.layers[0].self_attn.head_dim
        self.hidden_size: int = config.hidden_size
        self.norm_eps: float = config.rms_norm_eps
        self.borders: frozenset[int] = frozenset()
        self.place = device or Device(execution_device(model))
        self.parts: tuple[SegmentedModel, ...] = (self,)
        self.run_lock = threading.RLock()
        part = DecoderPart.of(model, layers, self.place.at)
        self.stored = part.stored
        self.layer_indices = part.indices
        self._take(part, kernel)

    def _take(self, part: DecoderPart, kernel: Kernel | None) -> None:
        """Lay out the layers for the device, or put them there as they are."""
        objection = can_fuse(part) if kernel is None else f"attention by {kernel.name}"
        self.layers: FusedLayers | ModuleLayers
        if objection is None:
            self.head_weight: torch.Tensor = part.head_weight()  # [V, E]
            self.layers = FusedLayers(part, self.head_weight)
        else:
            _log.info("layers run as transformers wrote them: %s", objection)
            part.settle()
            self.head_weight = part.head.weight.detach()
            self.layers = ModuleLayers(part, kernel)
        self.vocab_size: int = self.head_weight.shape[0]
        with present(part.norm):
            self.norm_weight: torch.Tensor = part.norm.weight.detach().clone()  # [E]

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
        """The same layers, not copied, cut at other exit layers; on several devices all parts.

        It has none of the heads and bridges that this one uses, nor this one those that it will.

        Raises:
            ModelError: exit layers that do not fit.
        """
        self._checked(exit_layers)
        ends = {part.layer_indices.stop for part in self.parts}
        cuts = tuple(sorted({*exit_layers, *ends}))
        borders = frozenset(d for d, layer in enumerate(cuts) if layer not in exit_layers)
        parts = tuple(copy.copy(part) for part in self.parts)
        for part in parts:
            part._heads, part.layers = {}, copy.copy(part.layers)
            part.layers.bridges = None
            part.exit_layers, part.borders, part.parts = cuts, borders, parts
        return parts[0]

    @property
    def depths(self) -> range:
        """0-based segments that this device runs."""
        first, stop = self.layer_indices.start, self.layer_indices.stop
        own = [d for d, layer in enumerate(self.exit_layers) if first < layer <= stop]
        return range(own[0], own[-1] + 1)

    def part(self, depth: int) -> SegmentedModel:
        """The part that runs segment `depth`."""
        return next(part for part in self.parts if depth in part.depths)

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
        """An empty pool for this model's keys, values and states, on all devices; see `KvPool`."""
        return KvPool(
            num_pages=num_pages,
            num_layers=len(self.layer_indices),
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
            others=[part.make_store(num_pages) for part in self.parts[1:]],
        )

    def make_store(self, num_pages: int) -> KvStore:
        """What a pool keeps on this device."""
        return KvStore(
            num_pages=num_pages,
            layers=self.layer_indices,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
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

    def run_segment(self, depth: int, tokens: PackedTokens, pool: KvStore) -> SegmentOutput:
        """Run packed tokens through segment `depth`, which has to be one of this device's.

        Reads the rows' states (their embeddings at depth 0), projects the keys/values of the tokens
        that left earlier, writes those of the rows, and leaves the rows' new states wherever a
        deeper segment could ask for them.

        Returns:
            The scored tokens' states, [S, E] each, in the order of the pack's sequences.
        """
        if tokens.token_ids is not None:
            hidden = self.layers.embed(tokens.token_ids)  # [N, E]
        else:
            hidden = pool.hidden.index_select(0, tokens.slots)
        hidden, before = self.layers.run(self.segment_layers(depth), hidden, tokens, pool)
        readers = [pool] if depth + 1 < self.depths.stop else []
        for reader in (*readers, *pool.deeper):
            real = slice(tokens.num_tokens)
            reader.keep(tokens.slots[real], hidden[real], is_first=depth == 0)
        return SegmentOutput(hidden.index_select(0, tokens.scored_rows), before)

    def use(self, fitted: FittedExits) -> None:
        """Let states go through fitted heads, and skipped layers get keys/values from bridges.

        Raises:
            FittedExitsError: they belong to a model of another shape.
            UsageError: a device ends before the first exit, and bridges read what is known there.
        """
        found = (fitted.num_layers, fitted.hidden_size)
        if found != (self.num_layers, self.hidden_size):
            raise FittedExitsError(
                f"exit.heads: found exits of a model with {found[0]} layers of width {found[1]}; "
                f"allowed: {self.num_layers} layers of width {self.hidden_size}"
            )
        if fitted.bridges and 0 in self.borders:
            raise UsageError(
                f"exit.heads: found bridges from layer {min(fitted.exit_layers)} on; allowed with "
                f"a device that ends after layer {self.exit_layers[0]}: an exit there or before"
            )
        for part in self.parts:
            part._use(fitted)

    def _use(self, fitted: FittedExits) -> None:
        """What of it this device needs."""
        ends = {self.exit_layers[depth] for depth in self.depths}
        self._heads = {
            layer: LaidOutHead(head, self.dtype, self.device)
            for layer, head in fitted.heads.items()
            if layer in ends
        }
        if fitted.bridges and self.depths.stop > 1:  # the first segment skips nothing
            self.layers.bridges = Bridges(
                fitted, self.dtype, self.device, self.norm_eps, self.layer_indices
            )

    @property
    def head_mlp_width(self) -> int | None:
        """Hidden units of the widest MLP among its exit heads; None: all of them are affine."""
        widths = [head.mlp_width for part in self.parts for head in part._heads.values()]
        return max((width for width in widths if width is not None), default=None)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, [B, E] -> [B, E] in the model's type."""
        return self.layers.normed(hidden)

    def normed_at(self, exit_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the LM head reads at an exit, [B, E] -> [B, E]: the final norm of the state.

        Where a head is fitted, of u + head(u), with u the unit state (an affine head is a tuned
        lens, arXiv 2303.08112, section 3, on states of one scale).
        """
        head = self._heads.get(exit_layer)
        if head is not None:
            hidden = head(unit_state(hidden, self.norm_eps).to(self.dtype)).to(hidden.dtype)
        return self.layers.normed(hidden)

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """LM-head scores over the whole vocabulary, [B, E] -> [B, V] of the model's type."""
        return self.layers.scores(normed)
