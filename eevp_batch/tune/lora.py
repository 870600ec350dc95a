"""A model with a trainable low-rank change beside each of its projections.

Thirty lines instead of peft: there is one kind of module to change, its gradients have to pass
through a loop of our own (`exit_loop`), and the engine merges the result from files that peft would
load whole. Nor does accelerate help here: it would keep the optimizer's state in pickles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from eevp_batch.engine.adapter import ADAPTED_PROJECTIONS, Adapter, LowRank

SCALE = 2.0
"""Factor on a change in training; in an `Adapter` it is in `up`."""


class LoraLinear(nn.Module):
    """A frozen projection and its change, W x + scale up down x.

    Products are made in the projection's type; the change itself is kept in float32. Nothing is
    changed at first, for `up` begins with zeros.

    Args:
        base: the projection.
        rank: of the change.
        generator: draws `down`.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        num_out, num_in = base.weight.shape
        bound = num_in**-0.5  # as torch draws a linear layer
        drawn = torch.rand(rank, num_in, generator=generator) * 2 * bound - bound
        self.down = nn.Parameter(drawn.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(num_out, rank, device=base.weight.device))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] of any float type -> [..., out] of the projection's type."""
        rows = rows.to(self.base.weight.dtype)
        low = linear(rows, self.down.to(rows.dtype))
        changed: torch.Tensor = self.base(rows) + SCALE * linear(low, self.up.to(rows.dtype))
        return changed


class LoraModel:
    """A model whose projections can be trained, and only they.

    Args:
        model: a `...ForCausalLM` of a supported family, in memory; it is changed.
        rank: of the changes.
        seed: of what they begin with.

    Attributes:
        body: the decoder, its projections wrapped.
        modules: the wrapped projections by name, as in an `Adapter`.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int) -> None:
        model.requires_grad_(False)
        self.body: Any = model.model
        self.modules: dict[str, LoraLinear] = {}
        generator = torch.Generator().manual_seed(seed)
        for number, layer in enumerate(self.body.layers):
            for projection in ADAPTED_PROJECTIONS:
                owner, _, name = projection.rpartition(".")
                parent = layer.get_submodule(owner)
                wrapped = LoraLinear(getattr(parent, name), rank, generator)
                setattr(parent, name, wrapped)
                self.modules[f"model.layers.{number}.{projection}"] = wrapped

    def adapter(self) -> Adapter:
        """The changes as they are now."""
        return Adapter(
            {
                name: LowRank(SCALE * module.up.detach().cpu(), module.down.detach().cpu().clone())
                for name, module in self.modules.items()
            }
        )
