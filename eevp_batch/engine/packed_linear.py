"""A matrix product on a CPU whose weight is laid out once, as oneDNN wants it.

Knows tensors only.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

PACK_ROWS = 64
"""Rows that weights are laid out for; other numbers run on the same layout."""
FEWEST_ROWS = 2
"""A product with a single row is another kernel, whose sums have another order."""


class PackedLinear:
    """x W^T + b with the weight laid out for oneDNN, or as it is where oneDNN has no such product.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = pack_weight(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out]; a row's result is the same for every N."""
        if len(rows) < FEWEST_ROWS:
            return self(pad(rows, (0, 0, 0, FEWEST_ROWS - len(rows))))[: len(rows)]
        if self._packed is None:
            return linear(rows, self._weight, self._bias)  # type: ignore[arg-type]
        out: torch.Tensor = _linear(rows, self._packed, self._bias, "none", [], "")
        return out


_linear = torch.ops.mkldnn._linear_pointwise.default


def pack_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight [out, in] in oneDNN's own layout; None where there is none for it here."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not has_onednn:
        return None
    if weight.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
    elif weight.dtype != torch.float32:
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    return packed
