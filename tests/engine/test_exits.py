"""Confidences and thresholds, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from eevp_batch.engine import exits
from eevp_batch.engine.exits import decayed
from eevp_batch.engine.pruned_vocab import prune
from eevp_batch.engine.score_summary import summarise
from eevp_batch.engine.segmented_model import SegmentOutput
from eevp_batch.spec import DecaySpec

V = 640
STATES = SegmentOutput(torch.randn(8, 16), torch.randn(8, 16))
NOBODY = torch.tensor([], dtype=torch.int64)


def full_scores() -> torch.Tensor:
    return torch.randn(8, V, generator=torch.Generator().manual_seed(0)) * 4


def confidence(
    kind: str,
    scores: torch.Tensor,
    outside: torch.Tensor | None,
    vocab_size: int,
    states: SegmentOutput,
) -> torch.Tensor:
    found = summarise(scores, mean_log=True)
    return exits.confidence(kind, found, outside, vocab_size - scores.shape[1], states)


def test_margin_is_the_difference_of_the_two_best_probabilities() -> None:
    best = full_scores().softmax(-1).sort(-1, descending=True).values
    found = confidence("margin", full_scores(), None, V, STATES)
    torch.testing.assert_close(found, best[:, 0] - best[:, 1], rtol=1e-5, atol=1e-6)


def test_max_prob_is_the_best_probability() -> None:
    found = confidence("max_prob", full_scores(), None, V, STATES)
    torch.testing.assert_close(found, full_scores().softmax(-1).amax(-1))


def test_entropy_is_one_when_certain_and_zero_when_even() -> None:
    certain = torch.full((1, V), -100.0)
    certain[0, 5] = 100.0
    both = torch.cat([certain, torch.zeros(1, V)])
    found = confidence("entropy", both, None, V, STATES)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-5)


def test_hidden_cosine_compares_the_states_around_the_layer() -> None:
    same = SegmentOutput(STATES.hidden, STATES.hidden * 3)
    found = confidence("hidden_cosine", full_scores(), None, V, same)
    torch.testing.assert_close(found, torch.ones(8))


@pytest.mark.parametrize("kind", ["margin", "max_prob"])
@pytest.mark.parametrize("k", [2, 16, 200])
def test_pruned_confidence_equals_the_full_one(kind: str, k: int) -> None:
    """With the mass outside folded in, cutting the vocabulary does not raise the confidence."""
    vocab, kept = prune(full_scores(), k, NOBODY)
    found = confidence(kind, kept, vocab.outside_lse, V, STATES)
    expected = confidence(kind, full_scores(), None, V, STATES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if k == 2:
        alone = confidence(kind, kept, None, V, STATES)
        assert (alone > expected).all(), "the renormalised softmax overstates"


def test_pruned_entropy_confidence_never_exceeds_the_full_one() -> None:
    """Spreading the mass outside evenly gives the highest entropy it can have."""
    vocab, kept = prune(full_scores(), 16, NOBODY)
    found = confidence("entropy", kept, vocab.outside_lse, V, STATES)
    expected = confidence("entropy", full_scores(), None, V, STATES)
    assert (found <= expected + 1e-6).all()
    nothing_cut, every = prune(full_scores(), V, NOBODY)
    torch.testing.assert_close(
        confidence("entropy", every, nothing_cut.outside_lse, V, STATES), expected
    )


def test_decay_follows_calm_and_the_papers_code() -> None:
    calm, scaled = DecaySpec(temperature=4.0), DecaySpec(temperature=4.0, scaled=True)
    for step in (0, 3, 64):
        fading = 0.1 * math.exp(-4.0 * step / 64)
        assert decayed(0.8, step, 64, calm) == pytest.approx(0.72 + fading)
        assert decayed(0.8, step, 64, scaled) == pytest.approx(0.8 * (0.9 + fading))
    assert decayed(0.8, 3, 64, None) == 0.8
    assert decayed(1.5, 0, 64, calm) == 1.0, "clipped: no confidence is greater than 1"
