"""A summary against the definitions, and against torch's own reductions."""

from __future__ import annotations

import pytest
import torch

from eevp_batch.engine import score_summary
from eevp_batch.engine.score_summary import first_argmax, summarise


def scores_with_ties(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """In bfloat16 many scores are equal, as a model's are."""
    generator = torch.Generator().manual_seed(columns)
    return (torch.randn(rows, columns, generator=generator) * 3).to(dtype)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"], autouse=True)
def with_and_without_kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not request.param:
        monkeypatch.setattr(score_summary, "kernels", lambda dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 32, 50, 96, 4096])
def test_every_fact_equals_its_definition(columns: int, dtype: torch.dtype) -> None:
    scores = scores_with_ties(9, columns, dtype)
    found, wide = summarise(scores, mean_log=True), scores.float()
    best = wide.sort(-1, descending=True).values
    assert torch.equal(found.best, best[:, 0])
    if columns > 1:
        assert torch.equal(found.second, best[:, 1]), "equal to the best where two scores are"
    else:
        assert found.second.isneginf().all()
    assert torch.equal(found.column, wide.argmax(-1)), "the first of equals"
    torch.testing.assert_close(found.lse, wide.logsumexp(-1), rtol=1e-6, atol=1e-6)
    logs = wide.log_softmax(-1)
    torch.testing.assert_close(found.mean_log, (logs.exp() * logs).sum(-1))


@pytest.mark.parametrize("columns", [64, 50])
def test_slices_change_no_row(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    scores = scores_with_ties(40, columns, torch.bfloat16)
    together = summarise(scores)
    monkeypatch.setattr(score_summary, "_SLICE", 200)
    sliced = summarise(scores)
    alone = torch.cat([summarise(row[None]).lse for row in scores])
    for name in ("best", "second", "column", "lse", "blocks"):
        assert torch.equal(getattr(together, name), getattr(sliced, name)), name
    assert torch.equal(together.lse, alone), "to the last bit"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_shows_in_its_row_only(bad: float) -> None:
    scores = scores_with_ties(3, 100, torch.bfloat16)
    scores[1, 99] = bad
    assert summarise(scores).lse.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("vocab_size", [7, 64, 4096])
def test_first_argmax_takes_the_first_of_equals(vocab_size: int) -> None:
    scores = torch.randint(0, 4, (50, vocab_size)).float()
    assert torch.equal(first_argmax(scores), scores.argmax(-1))
