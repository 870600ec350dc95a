"""Which attention kernel a device gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from eevp_batch.engine.attention import Gather, Kernel, paged_attention
from eevp_batch.engine.invariance import to_multiple
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import pack
from eevp_batch.engine.paged_kernels import VARLEN_PAGE, AttentionShape, Flex, Varlen
from eevp_batch.engine.sequence import Sequence as Generated
from eevp_batch.errors import first_line
from eevp_batch.records import Prompt, TokenExit

MOST_DIFFERENCE = 0.05
"""How far a kernel may be from gathering on random values of deviation 1; a wrong one is at 1."""

_log = logging.getLogger(__name__)


def choose_kernel(shape: AttentionShape) -> Kernel:
    """The first kernel that gives on this device what gathering gives; logged once.

    On a CPU pages are gathered. Elsewhere each kernel is tried on a few rows, for what a torch
    build can do on a device is only known there.
    """
    if shape.device.type == "cpu":
        return Gather()
    makers: dict[type[Varlen | Flex], Callable[[], Kernel]] = {
        Varlen: Varlen,
        Flex: lambda: Flex(shape.num_heads // shape.num_kv_heads),
    }
    for kind, make in makers.items():
        objection = kind.objection(shape)
        if objection is None:
            kernel = make()
            objection = objection_to(kernel, shape)
            if objection is None:
                _log.info("attention on %s: %s", shape.device, kernel.name)
                return kernel
            _log.warning("%s cannot be used: %s", kind.name, objection)
        else:
            _log.info("%s cannot be used: %s", kind.name, objection)
    _log.warning("attention on %s: %s, which is slow", shape.device, Gather.name)
    return Gather()


def objection_to(kernel: Kernel, shape: AttentionShape) -> str | None:
    """What is wrong with a kernel; None when it gives what gathering gives."""
    try:
        found = attend_a_little(kernel, shape)
    except RuntimeError as error:  # what torch raises for anything that a device does not have
        return first_line(error)
    expected = attend_a_little(Gather(), shape)
    differences = [
        (ours.float() - theirs.float()).abs().max().item()
        for ours, theirs in zip(found, expected, strict=True)
    ]
    if all(difference <= MOST_DIFFERENCE for difference in differences):  # False for NaN
        return None
    return f"its results differ from gathering's by {differences}"


@torch.inference_mode()
def attend_a_little(kernel: Kernel, shape: AttentionShape) -> list[torch.Tensor]:
    """Two prompts, then a token of each, and another beside rows that pad, through one layer.

    Returns:
        What came out of each pack for its real rows, [N, H, D].
    """
    lengths: Sequence[int] = (VARLEN_PAGE + 9, 3)
    sequences = [
        Generated(Prompt(row, [0] * length), 1, 3, 0) for row, length in enumerate(lengths)
    ]
    pool = KvPool(
        num_pages=sum(length // kernel.page_size + 1 for length in lengths),
        num_layers=1,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        hidden_size=1,
        max_resident=len(lengths),
        max_pages=VARLEN_PAGE,
        dtype=shape.dtype,
        device=shape.device,
        hidden_dtype=shape.dtype,
        layout=kernel.kv_layout,
        page_size=kernel.page_size,
    )
    for sequence in sequences:
        pool.admit(sequence, sequence.max_positions, [])
    generator = torch.Generator().manual_seed(0)
    found = []
    for padding in (int, int, to_multiple):  # int: none
        for sequence in sequences:
            pool.grow(sequence)
        tokens = pack(sequences, 0, pool, padding)
        query, key, value = (
            torch.randn(1, heads, tokens.num_rows, shape.head_size, generator=generator)
            .to(shape.dtype)
            .to(shape.device)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        layer: Any = SimpleNamespace(layer_idx=0)
        scaling = shape.head_size**-0.5
        layout = kernel.layout(tokens, pool)
        out, _ = paged_attention(layer, query, key, value, None, layout=layout, scaling=scaling)
        found.append(out[0, : tokens.num_tokens])
        for sequence in sequences:
            sequence.leave(0, [TokenExit(0, 1, 1.0)])
    return found
