"""A low-rank change of a model's own weights, W + up down (LoRA, arXiv 2106.09685).

It is merged when the model is laid out, so that a token pays nothing for it. Knows weights, in
files or in memory; nothing of how they are trained or run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from transformers import PreTrainedModel

from eevp_batch.errors import FittedExitsError

ADAPTED_PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Of every layer."""
_MARK = "eevp_adapter"


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one weight [out, in]: up [out, r] times down [r, in], float32."""

    up: torch.Tensor
    down: torch.Tensor

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight in float32, on the weight's device."""
        change = self.up.float() @ self.down.float()
        return weight.float() + change.to(weight.device)


@dataclass(frozen=True)
class Adapter:
    """Changes of a model's projections.

    Attributes:
        changes: by the projection's name, such as `model.layers.0.self_attn.q_proj`.
    """

    changes: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """R of the changes."""
        return max(len(change.down) for change in self.changes.values())

    @cached_property
    def digest(self) -> str:
        """What tells adapters apart."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            found.update(tensor.float().contiguous().cpu().numpy().tobytes())
        return found.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name."""
        out: dict[str, torch.Tensor] = {}
        for name, change in self.changes.items():
            out |= {f"{name}.up": change.up, f"{name}.down": change.down}
        return out

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """The inverse of `tensors`.

        Raises:
            KeyError: one half of a change is missing.
        """
        names = sorted({name.rpartition(".")[0] for name in tensors})
        return cls({n: LowRank(tensors[f"{n}.up"], tensors[f"{n}.down"]) for n in names})


class _Changed(Mapping[str, torch.Tensor]):
    """The stored tensors of one projection, its weight changed whenever it is read."""

    def __init__(self, stored: Mapping[str, torch.Tensor], change: LowRank) -> None:
        self._stored, self._change = stored, change

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        return self._change.added_to(tensor) if name == "weight" else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def is_merged(model: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether this adapter has been merged into this model."""
    return getattr(model, _MARK, None) == adapter.digest


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Merge an adapter into a model that has not been laid out yet; a second time does nothing.

    Sums are made in float32 of the weights as they are stored, and then get the model's type.

    Args:
        model: a `...ForCausalLM`, its weights in their files or in memory.
        adapter: of this model.

    Raises:
        FittedExitsError: it changes what the model does not have, or another one was merged before.
    """
    if is_merged(model, adapter):
        return
    if getattr(model, _MARK, None) is not None:
        raise FittedExitsError(
            "exit.heads: found another adapter than the one that was merged into this model; "
            "allowed: one adapter for a loaded model"
        )
    modules: dict[str, Any] = dict(model.named_modules())
    for name, change in adapter.changes.items():
        module = modules.get(name)
        found = (len(change.up), change.down.shape[1])
        allowed = None if module is None else tuple(module.weight.shape)
        if module is None or found != allowed:
            raise FittedExitsError(
                f"exit.heads: adapter of {name}: found shape {found}; allowed: {allowed}, that of "
                "the model's weight"
            )
    for name, change in adapter.changes.items():
        module = modules[name]
        if has_offloaded_params(module):
            hook = module._hf_hook
            hook.weights_map = _Changed(hook.weights_map, change)
        else:
            module.weight.copy_(change.added_to(module.weight))
    setattr(model, _MARK, adapter.digest)
