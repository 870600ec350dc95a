"""The CPU kernels at every width of vectors that a processor may have, this machine's or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from eevp_batch.engine import native, score_summary
from eevp_batch.engine.fused import FusedLayers
from eevp_batch.engine.score_summary import summarise
from eevp_batch.records import Prompt
from tests.engine.conftest import greedy, make_engine, run

FLAGS = native.FLAGS
NEVER = 1.5
"""A threshold that no token passes: every exit is looked at, and the output is full depth's."""


@pytest.fixture(params=[4, 8, 16], ids="{} lanes".format, autouse=True)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if native.kernels(torch.float32) is None:
        pytest.skip("no C compiler, so no kernels")
    build(monkeypatch, request.param)
    yield
    native.kernels.cache_clear()


def build(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """From here on the kernels have vectors so wide."""
    monkeypatch.setattr(native, "FLAGS", f"{FLAGS} -DLANES={lanes}")
    native.kernels.cache_clear()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_rows_come_out_as_transformers_has_them(
    family: str, tiny_model_path: Callable[[str], Path], prompts: list[Prompt]
) -> None:
    path = tiny_model_path(family)
    engine = make_engine(path, layers=[2, 4], threshold=NEVER)
    assert isinstance(engine.model.layers, FusedLayers), "or the kernels are not in use"
    for (row, _), found in run(engine, prompts[:12]).items():
        assert found.token_ids == greedy(path, prompts[int(row)]), f"row {row}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(7, 2 * 48, generator=generator) * 8).to(dtype)
    out, library = torch.empty(7, 48, dtype=dtype), native.kernels(dtype)
    assert library is not None
    library.eevp_silu_mul(gate_up.data_ptr(), out.data_ptr(), 7, 48)
    gate, up = gate_up.float().chunk(2, -1)
    torch.testing.assert_close(out, (silu(gate) * up).to(dtype))

    scores = (torch.randn(9, 1003, generator=generator) * 3).to(dtype)
    found = summarise(scores, mean_log=True)
    monkeypatch.setattr(score_summary, "kernels", lambda dtype: None)
    expected = summarise(scores, mean_log=True)
    for name in ("best", "second", "column", "blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.lse, expected.lse)
    torch.testing.assert_close(found.mean_log, expected.mean_log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_to_the_last_bit_at_every_width(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sums(dtype)
    build(monkeypatch, 16)
    for ours, widest in zip(here, sums(dtype), strict=True):
        assert torch.equal(ours, widest)


def sums(dtype: torch.dtype) -> list[torch.Tensor]:
    """What is summed over rows: a norm, products of a few ids, log-sum-exp and entropy."""
    generator, library = torch.Generator().manual_seed(1), native.kernels(dtype)
    assert library is not None
    states = torch.randn(9, 176, generator=generator)
    weight = torch.randn(50, 176, generator=generator).to(dtype)
    normed, scores = states.to(dtype), torch.empty(9, 6, dtype=dtype)
    ones, ids = torch.ones(176), torch.arange(54, dtype=torch.int32).remainder(50).view(9, 6)
    library.eevp_norm(states.data_ptr(), 0, ones.data_ptr(), 1e-5, normed.data_ptr(), 9, 176)
    parts = (normed.data_ptr(), weight.data_ptr(), ids.data_ptr(), scores.data_ptr())
    library.eevp_gathered(*parts, 9, 6, 176)
    whole = summarise((torch.randn(9, 1003, generator=generator) * 3).to(dtype), mean_log=True)
    assert whole.mean_log is not None
    return [normed, scores, whole.lse, whole.mean_log]
