"""How many sequences and pages fit: what `engine: auto` means."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from eevp_batch.engine.segment_times import full_batch
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import UsageError
from eevp_batch.spec import EngineSpec

AUTO_BATCH = {"cpu": 192, "cuda": 256}
AUTO_BATCH_FLOAT32 = {"cpu": 128, "cuda": 256}
AUTO_TOKENS = {"cpu": 2048, "cuda": 8192}
STEP_TOKENS = {"cpu": 128, "cuda": 2048}
AUTO_HOST_SHARE, AUTO_HOST_BYTES = 0.25, 4 << 30
AUTO_DEVICE_SHARE = 0.85
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
    """Bytes of one page: keys, values and the hidden states of so many tokens."""
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_size * model.dtype.itemsize
    state_bytes = model.hidden_size * model.layers.hidden_dtype.itemsize
    num_states = 2 if model.first_states == "own" else 1
    return model.layers.page_size * (kv_bytes + num_states * state_bytes)


def resolve_limits(engine: EngineSpec, model: SegmentedModel, context_length: int) -> Limits:
    """Replace every `auto` by a number that fits this model and this machine.

    The batch is 192 sequences on a CPU, 128 in float32, and 256 on a GPU. Resident are so many, and
    a full batch for each depth but the first, so that the deep queues fill while the first one
    runs. Keys and values get what those could use at full context, at most a quarter of the free
    host memory and 4 GiB, or 85 % of the free device memory.

    Raises:
        UsageError: `engine.kv_memory` holds not even one page.
    """
    kind = model.device.type
    auto = AUTO_BATCH_FLOAT32 if model.dtype == torch.float32 else AUTO_BATCH
    max_batch = auto[kind] if engine.max_batch == "auto" else engine.max_batch
    full = full_batch(model, max_batch) if model.num_segments > 1 else max_batch
    max_resident = max_batch + (model.num_segments - 1) * full
    if engine.max_resident != "auto":
        max_resident = engine.max_resident
    max_pages = -(-context_length // model.layers.page_size)
    one_page = page_bytes(model)
    budget = _auto_bytes(model.device) if engine.kv_memory == "auto" else engine.kv_memory
    num_pages = min(int(budget) // one_page, max_resident * max_pages)
    if num_pages < 1:
        raise UsageError(
            f"engine.kv_memory: found {budget} bytes; allowed: at least {one_page}, one page of "
            f"{model.layers.page_size} tokens"
        )
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


def _auto_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * AUTO_DEVICE_SHARE)
    return min(int(psutil.virtual_memory().available * AUTO_HOST_SHARE), AUTO_HOST_BYTES)
