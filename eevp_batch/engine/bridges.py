"""Keys and values of skipped layers from fitted maps: the KV policy `bridge`.

Knows states and the maps, nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from eevp_batch.engine.fitted import Bridge, FittedExits, bridge_input, unit_state
from eevp_batch.engine.kv_store import KvStore
from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.sequence import Origin


class BridgeInput(NamedTuple):
    """What the bridges of one origin read.

    Attributes:
        origin: where the tokens stopped.
        rows: which of the W tokens they are.
        states: [rows, in] what its bridge reads, or [rows, r] where that is of low rank.
    """

    origin: Origin
    rows: slice
    states: torch.Tensor


class Bridges:
    """The bridges of a model, laid out for its products.

    Args:
        fitted: exits with bridges.
        dtype: of the products.
        device: of the model.
        eps: of the model's norms.
        indices: 0-based layers that ask for them.
    """

    def __init__(
        self,
        fitted: FittedExits,
        dtype: torch.dtype,
        device: torch.device,
        eps: float,
        indices: range,
    ) -> None:
        self._dtype, self._eps, self._indices = dtype, eps, indices
        self._lift: dict[Origin, PackedLinear] = {}
        self._down: dict[Origin, PackedLinear] = {}
        self._layers: dict[Origin, dict[int, PackedLinear]] = {}
        for (kind, exit_layer), bridge in fitted.bridges.items():
            self._add(Origin(kind, exit_layer), bridge, device)

    def _add(self, origin: Origin, bridge: Bridge, device: torch.device) -> None:
        if bridge.lift is not None:
            self._lift[origin] = PackedLinear(bridge.lift.to(device, self._dtype))
        if bridge.down is not None:
            self._down[origin] = PackedLinear(bridge.down.to(device, self._dtype))
        self._layers[origin] = {
            layer: PackedLinear(
                affine.weight.to(device, self._dtype), affine.bias.to(device, self._dtype)
            )
            for layer, affine in bridge.layers.items()
            if layer - 1 in self._indices
        }

    @property
    def read_previous(self) -> bool:
        """Whether any of them reads the state of the token before."""
        return bool(self._lift)

    def read(
        self,
        hidden: torch.Tensor,
        before: torch.Tensor | None,
        origins: Sequence[tuple[Origin, slice]],
    ) -> list[BridgeInput]:
        """What the bridges of all layers need of tokens that stopped.

        Args:
            hidden: [W, E] states that they stopped with.
            before: [W, E] states after the first exit layer of the tokens before them; needed where
                `read_previous`.
            origins: see `PackedTokens`.
        """
        unit = unit_state(hidden, self._eps).to(self._dtype)
        previous = None if before is None else unit_state(before, self._eps).to(self._dtype)
        inputs = []
        for origin, rows in origins:
            states = unit[rows]
            lift, down = self._lift.get(origin), self._down.get(origin)
            if lift is not None and previous is not None:
                states = bridge_input(states, previous[rows], lift(states))
            inputs.append(BridgeInput(origin, rows, states if down is None else down(states)))
        return inputs

    def keys_values(self, index: int, inputs: Sequence[BridgeInput]) -> torch.Tensor:
        """Keys and values of layer `index` (0-based), before key norm and rotary.

        Returns:
            [W, 2 * num_kv_heads * D].
        """
        parts = [self._layers[origin][index + 1](states) for origin, _, states in inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ProjectingLayers(Protocol):
    """Layers that give keys/values to states that skip them."""

    @property
    def bridges(self) -> Bridges | None:
        """Where these come from; None: the layers' own projections."""

    def kv_of(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """See `FusedLayers.kv_of`."""


class SkippingTokens:
    """Tokens of a pack that are only projected: their states, read once for all layers.

    Args:
        layers: that they skip.
        tokens: the pack.
        pool: holds the states that they stopped with.
    """

    def __init__(self, layers: ProjectingLayers, tokens: PackedTokens, pool: KvStore) -> None:
        self._layers, self._bridges = layers, layers.bridges
        self._hidden = pool.hidden.index_select(0, tokens.project_slots)  # [W, E]
        self._inputs: list[BridgeInput] = []
        if self._bridges is not None:
            before = pool.states_before(tokens.project_before)
            self._inputs = self._bridges.read(self._hidden, before, tokens.origins)

    def keys_values(self, index: int) -> torch.Tensor:
        """Of layer `index` (0-based), from a bridge or as CALM, section 3.4.

        Returns:
            [W, 2 * num_kv_heads * D], before key norm and rotary.
        """
        if self._bridges is None:
            return self._layers.kv_of(index, self._hidden)
        return self._bridges.keys_values(index, self._inputs)
