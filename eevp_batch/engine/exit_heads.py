"""An exit head as the engine applies it: laid out for a device's products."""

from __future__ import annotations

import torch

from eevp_batch.engine.fitted import ExitHead, MlpHead
from eevp_batch.engine.packed_linear import PackedLinear


class LaidOutHead:
    """u + head(u) of unit states u.

    Args:
        head: as it was fitted.
        dtype: of the products.
        device: of the model.

    Attributes:
        mlp_width: r of its MLP; None: it is affine.
    """

    def __init__(self, head: ExitHead, dtype: torch.dtype, device: torch.device) -> None:
        affine = head.affine if isinstance(head, MlpHead) else head
        eye = torch.eye(len(affine.bias))
        self._affine = PackedLinear(
            (affine.weight.float().cpu() + eye).to(device, dtype), affine.bias.to(device, dtype)
        )
        self._mlp: tuple[PackedLinear, PackedLinear] | None = None
        self.mlp_width: int | None = None
        if isinstance(head, MlpHead):
            up = PackedLinear(head.up.weight.to(device, dtype), head.up.bias.to(device, dtype))
            self._mlp = up, PackedLinear(head.down.to(device, dtype))
            self.mlp_width = head.width

    def __call__(self, units: torch.Tensor) -> torch.Tensor:
        """[B, E] -> [B, E] of the products' type, which the units have."""
        out = self._affine(units)
        if self._mlp is None:
            return out
        up, down = self._mlp
        return out + down(up(units).relu_())
