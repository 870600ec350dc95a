"""A model on several devices: how much each has room for, and the parts that go there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from eevp_batch.engine.attention import Gather
from eevp_batch.engine.devices import FREE_SHARE, Device, sharers
from eevp_batch.engine.kv_store import PAGE_SIZE
from eevp_batch.engine.placement import ModelBytes, Room, place
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.stored_weights import is_tied
from eevp_batch.errors import ModelError

USEFUL_TOKENS = 1 << 20
"""Tokens that keys and values need room for at most, before balance is what counts: 512 sequences
of 2,048."""


def place_model(
    model: PreTrainedModel,
    exit_layers: Sequence[int],
    devices: Sequence[Device],
    kv_memory: int | None = None,
) -> SegmentedModel:
    """Put whole segments on devices, as `placement` finds best, and cut the model at its exits.

    A model without exits is cut between any two layers, where nobody may leave.

    Args:
        model: a `...ForCausalLM`, best one whose weights are still in their files.
        exit_layers: e_1 < ... < e_D = L.
        devices: in the order in which tokens come by.
        kv_memory: bytes that keys and values may have in all; None: what is free.

    Returns:
        The first device's part, which knows the others.

    Raises:
        UsageError: more devices than segments, or they do not have the memory.
        ModelError: see `SegmentedModel`; or the devices' attention kernels do not go together.
    """
    if len(devices) == 1:
        return SegmentedModel(model, exit_layers, device=devices[0])
    num_layers = model.config.num_hidden_layers
    ends = exit_layers if len(exit_layers) > 1 else range(1, num_layers + 1)
    sizes = model_bytes(model, ends)
    useful = USEFUL_TOKENS // PAGE_SIZE
    if kv_memory is not None:
        useful = max(1, min(useful, kv_memory // sizes.page(range(len(ends)))))
    found = place(sizes, rooms(devices), useful)
    borders = [0, *(ends[part.stop - 1] for part in found.segments)]
    # A page has to be as long on each device.
    kernel = Gather() if len({device.at.type for device in devices}) > 1 else None
    parts = [
        SegmentedModel(
            model,
            [num_layers],
            None if device.at.type == "cpu" else kernel,
            device,
            range(start, stop),
        )
        for device, (start, stop) in zip(devices, pairwise(borders), strict=True)
    ]
    pages = {part.layers.page_size for part in parts}
    if len(pages) > 1:
        raise ModelError(f"devices: found pages of {sorted(pages)} tokens; allowed: all alike")
    parts[0].parts = tuple(parts)
    return parts[0].recut(exit_layers)


def model_bytes(model: PreTrainedModel, ends: Sequence[int]) -> ModelBytes:
    """What a model takes, cut after the layers `ends`."""
    config, layers = model.config, model.model.layers
    itemsize = model.lm_head.weight.element_size()
    head_size = layers[0].self_attn.head_dim
    cuts = list(pairwise([0, *ends]))
    return ModelBytes(
        segments=[sum(_bytes(layers[index]) for index in range(*cut)) for cut in cuts],
        segment_layers=[stop - start for start, stop in cuts],
        head=_bytes(model.lm_head) + _bytes(model.model.norm),
        embedding=0 if is_tied(model) else _bytes(model.model.embed_tokens),
        kv_page=2 * PAGE_SIZE * config.num_key_value_heads * head_size * itemsize,
        state_page=PAGE_SIZE * config.hidden_size * torch.float32.itemsize,
    )


def _bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())


def rooms(devices: Sequence[Device]) -> list[Room]:
    """What is free on each device; devices that are cores of one CPU have an equal share of it."""
    found = []
    for device in devices:
        if device.at.type == "cuda":
            free = torch.cuda.mem_get_info(device.at)[0]
        else:
            free = psutil.virtual_memory().available
        found.append(Room(str(device), int(free * FREE_SHARE) // sharers(device, devices)))
    return found
