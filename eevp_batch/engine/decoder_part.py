"""Consecutive layers of a Hugging Face decoder for one device, and what every device has of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from eevp_batch.engine.stored_weights import (
    EMBEDDING,
    HEAD,
    StoredTensors,
    execution_device,
    is_tied,
    settle,
    stored_tensors,
)


@dataclass(frozen=True, slots=True)
class DecoderPart:
    """Some layers of a model and the modules around them.

    Attributes:
        config: the model's.
        indices: 0-based layers.
        layers: those layers, by index.
        embedding: makes states of ids; None where the first layer is elsewhere.
        norm, rotary, head: what every part has, for each ends at an exit.
        device: where it runs.
        is_tied: whether the head's weight is the embedding's.
        stored: the files of its weights; None where they are in memory.
    """

    config: Any
    indices: range
    layers: Mapping[int, Any]
    embedding: Any
    norm: Any
    rotary: nn.Module
    head: Any
    device: torch.device
    is_tied: bool
    stored: StoredTensors | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        indices: range | None = None,
        device: torch.device | None = None,
    ) -> DecoderPart:
        """Some layers of a model; what is not only theirs is copied.

        Args:
            model: a `...ForCausalLM`.
            indices: 0-based layers; None: all of them, and nothing is copied.
            device: where they are to run; None: where the model computes.
        """
        body: Any = model.model
        shared = (body.norm, body.rotary_emb, model.lm_head)
        norm, rotary, head = shared if indices is None else copy.deepcopy(shared)
        indices = range(len(body.layers)) if indices is None else indices
        return cls(
            config=model.config,
            indices=indices,
            layers={index: body.layers[index] for index in indices},
            embedding=body.embed_tokens if indices.start == 0 else None,
            norm=norm,
            rotary=rotary,
            head=head,
            device=device or execution_device(model),
            is_tied=is_tied(model),
            stored=stored_tensors(model),
        )

    def head_weight(self) -> torch.Tensor:
        """[V, E] of the head, for good: where it lies in its file, or a copy."""
        return self._for_good(self.head, EMBEDDING if self.is_tied else HEAD)

    def embedding_weight(self) -> torch.Tensor:
        """[V, E] of the embedding, as `head_weight`."""
        return self._for_good(self.embedding, EMBEDDING)

    def _for_good(self, module: nn.Module, name: str) -> torch.Tensor:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if self.stored is not None and has_offloaded_params(module):
            return self.stored.kept(name, weight.dtype)
        return weight.detach().clone()  # it may be gone with what was read

    def settle(self) -> None:
        """Put all of it on the device for good, as transformers has it."""
        around = (self.norm, self.rotary, self.head, self.embedding)
        for module in (*self.layers.values(), *around):
            if module is not None:
                settle(module, self.device)
        if self.is_tied and self.embedding is not None:
            self.embedding.weight = self.head.weight
