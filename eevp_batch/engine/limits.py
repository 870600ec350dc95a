"""How many sequences and pages fit: what `engine: auto` means."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from eevp_batch.engine.devices import FREE_SHARE
from eevp_batch.engine.segment_times import full_batch
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import UsageError
from eevp_batch.spec import EngineSpec

AUTO_BATCH = {"cpu": 192, "cuda": 256}
AUTO_BATCH_FLOAT32 = {"cpu": 128, "cuda": 256}
AUTO_TOKENS = {"cpu": 2048, "cuda": 8192}
STEP_TOKENS = {"cpu": 128, "cuda": 2048}
AUTO_HOST_SHARE, AUTO_HOST_BYTES = 0.25, 4 << 30
AGE_CAP_STEPS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may hold and run at a time.

    Attributes:
        max_batch: sequences per segment run.
        full_batch: sequences from which on a segment run need not wait for more.
        max_resident: sequences in memory; more than a batch when there are exits, so that a full
            batch can gather at each depth.
        max_tokens: packed tokens per segment run, prompts included.
        step_tokens: rows to which new prompts fill up a run of the first segment.
        num_pages: pages of the KV pool.
        max_pages: pages of the longest sequence.
        shares_prefixes: whether prompt beginnings that rows share are computed once.
        age_cap: steps after which waiting outweighs a full batch.
    """

    max_batch: int
    full_batch: int
    max_resident: int
    max_tokens: int
    step_tokens: int
    num_pages: int
    max_pages: int
    shares_prefixes: bool = True
    age_cap: int = AGE_CAP_STEPS


def page_bytes(model: SegmentedModel) -> int:
    """Bytes of one page on all devices: keys, values and the hidden states of so many tokens."""
    return sum(_page_bytes(part) for part in model.parts)


def _page_bytes(part: SegmentedModel) -> int:
    per_layer = 2 * part.num_kv_heads * part.head_size * part.dtype.itemsize
    state_bytes = part.hidden_size * part.layers.hidden_dtype.itemsize
    num_states = 2 if part.first_states == "own" else 1
    per_token = len(part.layer_indices) * per_layer + num_states * state_bytes
    return part.layers.page_size * per_token


def resolve_limits(engine: EngineSpec, model: SegmentedModel, context_length: int) -> Limits:
    """Replace every `auto` by a number that fits this model and this machine.

    The batch is 192 sequences on a CPU, 128 in float32, and 256 on a GPU. Resident are so many for
    each device, and a full batch for each depth but the first, so that the deep queues fill while
    the first one runs. Keys and values get what those could use at full context, at most a quarter
    of the free host memory and 4 GiB, or 85 % of the free device memory; the device with the least
    room for them decides.

    Raises:
        UsageError: `engine.kv_memory` holds not even one page.
    """
    kind = model.device.type
    auto = AUTO_BATCH_FLOAT32 if model.dtype == torch.float32 else AUTO_BATCH
    max_batch = auto[kind] if engine.max_batch == "auto" else engine.max_batch
    full = full_batch(model, max_batch) if model.num_segments > 1 else max_batch
    max_resident = len(model.parts) * max_batch + (model.num_segments - 1) * full
    if engine.max_resident != "auto":
        max_resident = engine.max_resident
    max_pages = -(-context_length // model.layers.page_size)
    num_pages = min(_pages_that_fit(engine, model), max_resident * max_pages)
    return Limits(
        max_batch=max_batch,
        full_batch=full,
        max_resident=max_resident,
        max_tokens=max(AUTO_TOKENS[kind], max_batch),
        step_tokens=max(STEP_TOKENS[kind], max_batch),
        num_pages=num_pages,
        max_pages=max_pages,
        shares_prefixes=engine.prefix_sharing,
    )


def _pages_that_fit(engine: EngineSpec, model: SegmentedModel) -> int:
    """Pages that the job's memory, or what is free on each device, has room for.

    Raises:
        UsageError: not one.
    """
    sizes: dict[torch.device, int] = {}  # of a page, by memory: parts of a CPU share one
    for part in model.parts:
        sizes[part.device] = sizes.get(part.device, 0) + _page_bytes(part)
    if engine.kv_memory == "auto":
        found = {device: (_auto_bytes(device), size) for device, size in sizes.items()}
        budget, one_page = min(found.values(), key=lambda pair: pair[0] // pair[1])
    else:
        budget, one_page = engine.kv_memory, sum(sizes.values())
    if budget < one_page:
        raise UsageError(
            f"engine.kv_memory: found {budget} bytes; allowed: at least {one_page}, one page of "
            f"{model.layers.page_size} tokens"
        )
    return budget // one_page


def _auto_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    return min(int(psutil.virtual_memory().available * AUTO_HOST_SHARE), AUTO_HOST_BYTES)
