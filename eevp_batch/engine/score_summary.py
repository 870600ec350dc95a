"""What a decision needs of a row of scores, in one pass: best, second, first argmax, log-sum-exp.

Scores over a vocabulary are the largest tensor of a step (64 rows of 49,152 are 12.6 MB in
float32), so they are never copied to float32 as a whole: a kernel reads each row twice, the second
time out of the cache. Without it, slices of rows go through torch's own operations in the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from eevp_batch.engine.native import kernels

BLOCK = 32
_SLICE = 2**20
"""Scores per slice: 4 MiB in float32. Measured at 64 rows of 49,152: 16 rows a slice are best."""


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Facts about [B, C] scores, all float32 unless said otherwise.

    Attributes:
        best, second: [B] the two largest scores; `second` is -inf where C is 1.
        column: [B] int64, the first column that holds `best`.
        lse: [B] log-sum-exp.
        blocks: [B, ceil(C / BLOCK)] the largest score of every `BLOCK` columns.
        mean_log: [B] sum of p log p over the columns, p their softmax; None unless asked for.
        num_columns: C.
    """

    best: torch.Tensor
    second: torch.Tensor
    column: torch.Tensor
    lse: torch.Tensor
    blocks: torch.Tensor
    mean_log: torch.Tensor | None
    num_columns: int


def summarise(scores: torch.Tensor, *, mean_log: bool = False) -> ScoreSummary:
    """Summarise each row of scores [B, C] of any float type; rows do not affect one another."""
    columns = scores.shape[1]
    library = None if scores.is_cuda or scores.stride(1) != 1 else kernels(scores.dtype)
    if library is None:
        blocks, log_sum, mean = _read_in_slices(scores, mean_log)
    else:
        blocks, log_sum, mean = _read_natively(library, scores)
    block = blocks.argmax(-1, keepdim=True)  # [B, 1], the first of equals
    places = block * BLOCK + torch.arange(BLOCK, device=scores.device)  # [B, BLOCK]
    inside = scores.gather(1, places.clamp(max=columns - 1)).float()
    inside = inside.masked_fill(places >= columns, -torch.inf)
    inner = inside.argmax(-1, keepdim=True)  # [B, 1]
    best = inside.gather(1, inner)[:, 0]
    rest = inside.scatter(1, inner, -torch.inf).amax(-1)
    others = blocks.scatter(1, block, -torch.inf).amax(-1)
    return ScoreSummary(
        best=best,
        second=torch.maximum(rest, others),
        column=(block * BLOCK + inner)[:, 0],
        lse=best + log_sum,
        blocks=blocks,
        mean_log=mean if mean_log else None,
        num_columns=columns,
    )


_Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Block maxima [B, ceil(C / BLOCK)], log-sum-exp less the best score [B], sum of p log p [B]."""


def _read_natively(library: ctypes.CDLL, scores: torch.Tensor) -> _Read:
    rows, columns = scores.shape
    blocks = torch.empty(rows, -(-columns // BLOCK))
    log_sum, mean = torch.empty(rows), torch.empty(rows)
    pointers = [part.data_ptr() for part in (blocks, log_sum, mean)]
    library.eevp_summary(scores.data_ptr(), rows, columns, scores.stride(0), *pointers)
    return blocks, log_sum, mean - log_sum


def _read_in_slices(scores: torch.Tensor, mean_log: bool) -> _Read:
    rows, columns = scores.shape
    num_blocks = -(-columns // BLOCK)
    like: dict[str, Any] = {"dtype": torch.float32, "device": scores.device}
    blocks = torch.empty(rows, num_blocks, **like)
    log_sum, mean = torch.empty(rows, **like), torch.empty(rows, **like)
    slices = _Slices(scores, num_blocks * BLOCK)
    for here, values, logs in slices:
        torch.amax(values.view(-1, num_blocks, BLOCK), -1, out=blocks[here])
        torch.log_softmax(values, -1, out=logs)
        block = torch.argmax(blocks[here], -1)
        row = slices.row_numbers[: len(block)]
        # At the best score log-softmax is minus the log of the sum, nothing cancels.
        log_sum[here] = -logs.view(-1, num_blocks, BLOCK)[row, block].amax(-1)
        if mean_log:
            real = logs[:, :columns]
            mean[here] = (real.exp() * real).sum(-1)
    return blocks, log_sum, mean


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """The first column of each row's largest score, [B, C] -> [B]; `argmax` in blocks."""
    rows, columns = scores.shape
    if columns % BLOCK:
        return scores.argmax(-1)
    blocked = scores.view(rows, -1, BLOCK)
    block = blocked.amax(-1).argmax(-1)  # [B]
    inside = blocked[torch.arange(rows, device=scores.device), block].argmax(-1)
    return block * BLOCK + inside


class _Slices:
    """Slices of rows: where they lie, their scores in float32 padded by -inf, and scratch."""

    def __init__(self, scores: torch.Tensor, width: int) -> None:
        rows, columns = scores.shape
        fitting = rows if scores.is_cuda else max(1, _SLICE // width)
        num_slices = max(1, -(-rows // fitting))
        self._scores, self._step = scores, max(1, -(-rows // num_slices))
        self._is_ready = scores.dtype == torch.float32 and columns == width
        like: dict[str, Any] = {"dtype": torch.float32, "device": scores.device}
        self._logs = torch.empty(self._step, width, **like)
        self.row_numbers = torch.arange(self._step, device=scores.device)
        if not self._is_ready:
            self._values = torch.empty(self._step, width, **like)
            self._values[:, columns:] = -torch.inf

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        rows, columns = self._scores.shape
        for start in range(0, rows, self._step):
            part = self._scores[start : start + self._step]
            values = part
            if not self._is_ready:
                values = self._values[: len(part)]
                values[:, :columns] = part
            yield slice(start, start + len(part)), values, self._logs[: len(part)]
