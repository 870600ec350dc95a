"""Keeping K ids: exact, with the forced ids, and with the mass outside accounted for."""

from __future__ import annotations

import pytest
import torch

from eevp_batch.engine import pruned_vocab, score_summary
from eevp_batch.engine.pruned_vocab import exact_best, prune, pruned_scores, top_k
from eevp_batch.engine.score_summary import summarise

NOBODY = torch.tensor([], dtype=torch.int64)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def with_and_without_kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not request.param:
        for module in (pruned_vocab, score_summary):
            monkeypatch.setattr(module, "kernels", lambda dtype: None)


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [7, 50, 96, 4096])
@pytest.mark.parametrize("k", [1, 2, 5, 64, 300, 2000])
def test_top_k_is_exact_for_every_shape(vocab_size: int, k: int, dtype: torch.dtype) -> None:
    """In bfloat16 many scores are equal."""
    scores = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(k)).to(dtype)
    values, columns = top_k(scores, k)
    expected = scores.topk(min(k, vocab_size), sorted=True).values
    assert torch.equal(values.sort(-1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, columns), values), "columns name the values"
    assert (columns.diff(dim=-1) > 0).all(), "columns ascend, so no id is kept twice"


def test_forced_ids_are_kept_whatever_they_score() -> None:
    scores = torch.randn(6, 1024)
    scores[:, 3] = -50.0
    before = scores.clone()
    vocab, kept = prune(scores, 8, torch.tensor([3, 700]))
    assert torch.equal(scores, before), "pruning leaves the scores as they were"
    for row in vocab.ids.tolist():
        assert {3, 700} <= set(row), "end and stop ids are always kept"
    assert torch.equal(kept, before.gather(1, vocab.ids.long()))


def test_kept_and_outside_mass_add_up_to_the_whole() -> None:
    scores = torch.randn(16, 1000) * 3
    vocab, kept = prune(scores, 40, NOBODY)
    whole = torch.logaddexp(kept.logsumexp(-1), vocab.outside_lse)
    torch.testing.assert_close(whole, scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_the_whole_vocabulary_leaves_nothing_outside() -> None:
    scores = torch.randn(4, 100)
    vocab, kept = prune(scores, 100, NOBODY)
    assert torch.equal(kept, scores), "K = V keeps every id in its place"
    assert torch.equal(vocab.outside_lse, torch.full((4,), -torch.inf))


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_keep_k_ids_nevertheless(bad: float) -> None:
    scores = torch.randn(3, 4096)
    scores[1, 10:40] = bad
    scores[2] = bad
    for k in (5, 64, 2000):
        ids = prune(scores, k, torch.tensor([3, 700]))[0].ids
        assert ids.shape == (3, k) and (ids.diff(dim=-1) > 0).all() and ids.max() < 4096


@pytest.mark.usefixtures("with_and_without_kernels")
def test_pruned_scores_equal_full_scores_at_the_kept_ids() -> None:
    normed, weight = torch.randn(5, 32), torch.randn(512, 32)
    full = normed @ weight.T
    ids = prune(full, 20, NOBODY)[0].ids
    torch.testing.assert_close(
        pruned_scores(normed, weight, ids), full.gather(1, ids.long()), rtol=1e-5, atol=1e-5
    )


def test_scores_that_look_equal_are_told_apart_in_float32() -> None:
    """In bfloat16 two scores near 20 differ only from a sixteenth on."""
    generator = torch.Generator().manual_seed(0)
    normed = torch.randn(6, 32, generator=generator).bfloat16()
    weight = torch.randn(320, 32, generator=generator).bfloat16()
    weight[200] = weight[100]  # equal also in float32: the first counts
    twin = normed[:3].float() * 0.75
    weight[7:10] = twin.bfloat16()
    weight[17:20] = (twin * 1.003).bfloat16()
    exact = normed.float() @ weight.float().T
    scores = exact.bfloat16()
    found = summarise(scores)
    assert (found.best == found.second).any(), "some of them must look equal"
    best = exact_best(normed, weight, scores, None, found)
    assert best.tolist() == exact.argmax(-1).tolist()
    ids = torch.arange(320).expand(6, 320).flip(1)
    turned = scores.flip(1)
    best = exact_best(normed, weight, turned, ids, summarise(turned))
    assert best.tolist() == exact.flip(1).argmax(-1).tolist(), "also among kept ids"
