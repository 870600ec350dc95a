"""A matrix product on a CPU whose weight is laid out once, as oneDNN wants it.

Knows tensors only.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch.nn.functional import linear, pad

from eevp_batch.engine.row_sizes import Product, alike, blocks, sums_differ, to_size

_log = logging.getLogger(__name__)

PACK_ROWS = 64
"""Rows that weights are laid out for; other numbers run on the same layout."""
FEWEST_ROWS = 2
"""On a GPU a product with a single row is another kernel, whose sums have another order."""


class PackedLinear:
    """x W^T + b with the weight laid out for oneDNN, or as it is where oneDNN has no such product.

    A CPU without bfloat16 instructions would take some 10 times as long for a bfloat16 product as
    for one in float32. There the weight is kept in float32, twice as large, and what comes out is
    rounded: no less exact, for bfloat16 products are summed in float32 as well.

    Args:
        weight: [out, in].
        bias: [out], or None.
        widens: whether a bfloat16 product is made in float32; None: where this CPU has none.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, widens: bool | None = None
    ) -> None:
        # Detached, for a graph would keep the weight alive as it was read.
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._narrow: torch.dtype | None = None
        if lacks_products(weight) if widens is None else widens:
            self._narrow = weight.dtype
            weight = weight.float()
            self._bias = None if self._bias is None else self._bias.float()
        self._packed = pack_weight(weight)
        self._on_cpu = weight.device.type == "cpu"
        self._shape = weight.shape[1], weight.shape[0]
        self._sums_differ = self._packed is not None and sums_differ(weight)
        self._weight = weight if self._packed is None else None

    @property
    def is_laid_out(self) -> bool:
        """Whether nothing is kept of the weight as it was given."""
        return self._packed is not None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out]; a row's result is the same for every N."""
        if self._sums_differ:
            return self._in_blocks(rows)
        return self._padded(
            rows, to_size(len(rows)) if self._on_cpu else max(FEWEST_ROWS, len(rows))
        )

    def _in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """By products of the sizes that sum alike."""
        sizes = blocks(len(rows), alike(_laid_out, *self._shape, torch.get_num_threads()))
        if len(sizes) == 1:
            return self._padded(rows, sizes[0])
        parts = torch.split(rows, sizes[0])
        return torch.cat(
            [self._padded(part, size) for part, size in zip(parts, sizes, strict=True)]
        )

    def _padded(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        """One product, of `size` rows."""
        if missing := size - len(rows):
            return self._padded(pad(rows, (0, 0, 0, missing)), size)[: len(rows)]
        if self._narrow is not None:
            return self._product(rows.float()).to(self._narrow)
        return self._product(rows)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return linear(rows, self._weight, self._bias)  # type: ignore[arg-type]
        out: torch.Tensor = _linear(rows, self._packed, self._bias, "none", [], "")
        return out


def lacks_products(weight: torch.Tensor) -> bool:
    """Whether this is a bfloat16 weight on a CPU that multiplies none."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    has: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not has:
        _tell_once()
    return not has


@functools.cache
def _tell_once() -> None:
    _log.warning(
        "this CPU has no bfloat16 instructions: products are made in float32, weights take twice "
        "their memory; model.dtype: float32 is as fast and more exact"
    )


_linear = torch.ops.mkldnn._linear_pointwise.default


def pack_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight [out, in] in oneDNN's own layout; None where there is none for it here."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not has_onednn:
        return None
    if lacks_products(weight) or weight.dtype not in (torch.bfloat16, torch.float32):
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    return packed


def _laid_out(weight: torch.Tensor) -> Product:
    """A weight's product of exactly as many rows as it is given."""
    return PackedLinear(weight)._product
