"""Exit heads as the engine applies them: what was fitted, the same in every batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eevp_batch.engine.exit_heads import LaidOutHead
from eevp_batch.engine.fitted import Affine, MlpHead

WIDTH = 48
CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]


def random_head(width: int = WIDTH, mlp_width: int = 12, seed: int = 0) -> MlpHead:
    """An MLP head whose MLP weighs as much as its affine map."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    up = Affine(draw(mlp_width, width), draw(mlp_width))
    return MlpHead(Affine(draw(width, width), draw(width)), up, draw(width, mlp_width))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_mlp_that_gives_nothing_is_the_affine_head(dtype: torch.dtype) -> None:
    head = random_head()
    silent = replace(head, down=torch.zeros_like(head.down))
    units = torch.randn(9, WIDTH).to(dtype)
    affine = LaidOutHead(head.affine, dtype, CPU)
    assert torch.equal(LaidOutHead(silent, dtype, CPU)(units), affine(units))
    assert not torch.equal(LaidOutHead(head, dtype, CPU)(units), affine(units))


def test_what_is_laid_out_is_what_was_fitted() -> None:
    head, units = random_head(), torch.randn(9, WIDTH)
    affine = units @ head.affine.weight.T + head.affine.bias
    bent = (units @ head.up.weight.T + head.up.bias).clamp(min=0) @ head.down.T
    torch.testing.assert_close(head(units), affine + bent)
    torch.testing.assert_close(LaidOutHead(head, torch.float32, CPU)(units), units + affine + bent)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    head, units = LaidOutHead(random_head(), dtype, CPU), torch.randn(70, WIDTH).to(dtype)
    whole = head(units)
    for size in (1, 2, 3, 17, 64):
        assert torch.equal(head(units[:size]), whole[:size]), f"{size} rows"
