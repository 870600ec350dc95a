"""Sampling: keyed by the row, faithful to the distribution, equal to transformers' warpers."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eevp_batch.engine.sampling import choices, draw, generation_seed, penalise, uniform
from eevp_batch.spec import SamplingSpec


def test_seeds_differ_by_job_row_sample_and_kind_of_id() -> None:
    seeds = [
        generation_seed(0, "7", 0),
        generation_seed(1, "7", 0),
        generation_seed(0, "7", 1),
        generation_seed(0, "8", 0),
        generation_seed(0, 7, 0),
    ]
    assert len(set(seeds)) == len(seeds), "no two generations share a seed"
    assert generation_seed(0, "7", 0) == seeds[0], "the seed is a function of its arguments"


def test_numbers_are_even() -> None:
    numbers = torch.tensor([uniform(generation_seed(3, row, 0), row % 7) for row in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    chi_square = ((counts - 400) ** 2 / 400).sum().item()
    assert chi_square < 33.7, "9 degrees of freedom: exceeded once in 10,000 when even"


def test_each_purpose_has_numbers_of_its_own() -> None:
    numbers = {uniform(5, step, purpose) for step in range(9) for purpose in ("", "a", "b")}
    assert len(numbers) == 27
    assert uniform(5, 3, "a") == uniform(5, 3, "a")


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.3, 5, 1.0), (1.0, None, 0.8), (0.9, 7, 0.6)],
)
def test_draws_follow_the_distribution_of_transformers_warpers(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    """An even grid of numbers must hit each token as often as its probability says."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 40, generator=generator) * 2
    warped = TemperatureLogitsWarper(temperature)(None, scores.clone())
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0]
    draws = 20_000
    numbers = (torch.arange(draws) + 0.5) / draws
    sampling = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p)
    found = choices(scores, sampling)
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(1))
    picked = draw(found.probabilities.expand(draws, -1), numbers)
    shares = torch.bincount(found.columns[0][picked], minlength=40) / draws
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("almost_one", [1.0 - 2**-24, 1.0])
def test_a_number_close_to_one_stays_inside(almost_one: float) -> None:
    weights = torch.tensor([[0.3, 0.1, 0.0, 0.0], [0.0, 3.0, 0.0, 1e-9]])
    drawn = draw(weights, torch.tensor([almost_one] * 2))
    assert weights[[0, 1], drawn].min() > 0, "what has no weight is never drawn"


def test_penalty_equals_transformers() -> None:
    scores = torch.randn(3, 20)
    token_ids = torch.tensor([[1, 2, 2], [5, 5, 5], [0, 19, 7]])
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, token_ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(token_ids, scores.clone())
    torch.testing.assert_close(penalise(scores, seen, 1.3), expected)
