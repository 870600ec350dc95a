"""How long a layer takes by batch size, measured when an engine is built.

The larger a batch, the less a row costs, up to a size that depends on the machine and the model.
The depth queues wait for that many sequences before they run a deep segment. What is measured here
moves time, never a result.
"""

from __future__ import annotations

import time

import torch

from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.segmented_model import SegmentedModel

SIZES = (16, 32, 64, 96, 128, 192, 256)
NEAR_BEST = 1.1
"""A batch is full when a row costs at most so many times what it costs in the best one."""
REPEATS = 3


def full_batch(model: SegmentedModel, max_batch: int) -> int:
    """Smallest batch in which a row is nearly as cheap as in any up to `max_batch`.

    A few milliseconds on a small model: the first layer is run on rows that belong to nobody.
    """
    sizes = [size for size in SIZES if size < max_batch]
    return nearly_best({size: layer_time(model, size) for size in (*sizes, max_batch)})


def nearly_best(seconds: dict[int, float]) -> int:
    """Smallest batch in which a row costs at most `NEAR_BEST` times what it costs in the best.

    Args:
        seconds: of a run, by batch size.
    """
    per_row = {size: taken / size for size, taken in seconds.items()}
    best = min(per_row.values())
    return min(size for size, cost in per_row.items() if cost <= NEAR_BEST * best)


@torch.inference_mode()
def layer_time(model: SegmentedModel, num_rows: int) -> float:
    """Seconds of the first layer over so many rows, attention's reading left out; the best try."""
    pool = model.make_pool(num_pages=1, max_resident=1, max_pages=1)
    num_rows = model.layers.padding(num_rows)
    rows = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
    tokens = PackedTokens(
        token_ids=rows,
        positions=rows,
        slots=rows,
        scored=[],
        scored_rows=rows,
        project_positions=rows[:0],
        project_slots=rows[:0],
        project_before=rows[:0],
        origins=[],
        spans=[],
        num_tokens=0,
    )
    times = []
    for _ in range(REPEATS):
        hidden = model.layers.embed(rows)
        _wait(model.device)
        started = time.perf_counter()
        model.layers.run(range(1), hidden, tokens, pool)
        _wait(model.device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
