"""Heads: zeros are the logit lens, the written-down gradient is autograd's, fitting helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.fitted import Affine, unit_state
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune import head_training
from eevp_batch.tune.head_training import HeadSettings, fit_head, kl_and_gradient
from eevp_batch.tune.heads import (
    Choices,
    Taught,
    agreement,
    choices,
    head_output,
    identity_head,
    share_leaving,
    share_leaving_of_all,
    teach,
)
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> SegmentedModel:
    return SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])


def test_a_head_of_zeros_is_the_logit_lens(any_tiny_model: Path) -> None:
    plain = load_model(any_tiny_model)
    model = SegmentedModel(load_model(any_tiny_model), [NUM_LAYERS])
    hidden = 3 * torch.randn(20, model.hidden_size)
    units = unit_state(hidden, model.norm_eps)
    zeros = identity_head(model.hidden_size, model.device)
    with torch.no_grad():
        expected = plain.model.norm(hidden)
        scores = plain.lm_head(expected).softmax(-1)
        found = head_output(model, zeros, units)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    said, top = choices(model, zeros, units), scores.topk(2)
    assert torch.equal(said.ids, top.indices[:, 0])
    torch.testing.assert_close(
        said.margins, top.values[:, 0] - top.values[:, 1], atol=1e-4, rtol=1e-3
    )


def test_what_is_taught_is_the_full_distribution(model: SegmentedModel) -> None:
    hidden = torch.randn(70, model.hidden_size)
    best, ids, probabilities = teach(model, hidden, k=10)
    full = model.scores(model.normed(hidden)).softmax(-1)
    assert torch.equal(best, full.argmax(-1))
    torch.testing.assert_close(probabilities, full.gather(1, ids))
    torch.testing.assert_close(probabilities.sum(-1), full.topk(10).values.sum(-1))


@pytest.mark.parametrize("k", [5, 320])
def test_the_gradient_is_that_of_autograd(model: SegmentedModel, k: int) -> None:
    _, ids, teacher = teach(model, torch.randn(6, model.hidden_size), k)
    normed = torch.randn(6, model.hidden_size, requires_grad=True)
    q = (normed @ model.head_weight.T).softmax(-1)
    inside = q.gather(1, ids)
    expected = (teacher * (teacher / inside).log()).sum(-1)
    if k < 320:
        left_p, left_q = 1 - teacher.sum(-1), 1 - inside.sum(-1)
        expected = expected + left_p * (left_p / left_q).log()
    expected.sum().backward()
    loss, gradient = kl_and_gradient(model, normed.detach(), ids, teacher)
    assert loss == pytest.approx(expected.mean().item(), abs=1e-4)
    torch.testing.assert_close(gradient, normed.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lacks", [True, False])
def test_a_cpu_without_bfloat16_products_is_not_asked_for_one(
    lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_training, "lacks_products", lambda weight: lacks)
    gradient, weight = torch.randn(6, 320), torch.randn(320, 64).bfloat16()
    found, exact = head_training._times_weight(gradient, weight), gradient @ weight.float()
    assert found.dtype == torch.float32
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error < 1e-5 if lacks else 1e-4 < error < 2e-2, "bfloat16 keeps three digits"


def known(model: SegmentedModel, count: int, seed: int) -> Taught:
    """Tokens whose last state is an affine map of the exit's, so that a head can be perfect."""
    rows, maps = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1)
    width = model.hidden_size
    units = unit_state(torch.randn(count, width, generator=rows), model.norm_eps)
    change = 0.2 * torch.randn(width, width, generator=maps)
    hidden = units + units @ change.T + torch.randn(width, generator=maps)
    return Taught(units, *teach(model, hidden))


def test_fitting_finds_a_head_that_is_there(model: SegmentedModel) -> None:
    tokens, held_out = known(model, 1500, 2), known(model, 300, 3)
    zeros = identity_head(model.hidden_size, model.device)
    before = agreement(choices(model, zeros, held_out.units), held_out.best_ids)
    steps: list[tuple[int, int]] = []
    settings = HeadSettings(epochs=10, batch=64, learning_rate=1e-2)
    fit = fit_head(model, zeros, tokens, held_out, settings, lambda *at: steps.append(at))
    after = agreement(fit.choices, held_out.best_ids)
    assert before < 0.2 < 0.8 < after, f"agreement went from {before:.2f} to {after:.2f}"
    assert fit.curve[-1]["loss"] < fit.curve[1]["loss"] / 10
    kept = max(fit.curve, key=lambda point: (point["leaving"], point["agreement"]))
    assert kept["agreement"] == after, "the best head is kept"
    assert steps[0] == (1, 240) and steps == sorted(steps)


def test_fitting_twice_gives_the_same_head(model: SegmentedModel) -> None:
    tokens, held_out = known(model, 400, 2), known(model, 50, 3)
    zeros = identity_head(model.hidden_size, model.device)

    def fitted(seed: int) -> torch.Tensor:
        settings = HeadSettings(epochs=2, batch=64, learning_rate=1e-2, seed=seed)
        return fit_head(model, zeros, tokens, held_out, settings).head.weight

    first = fitted(seed=0)
    assert torch.equal(first, fitted(seed=0))
    assert not torch.equal(first, fitted(seed=1))


def test_a_start_worse_than_the_logit_lens_is_not_taken(model: SegmentedModel) -> None:
    units = unit_state(torch.randn(100, model.hidden_size), model.norm_eps)
    tokens = Taught(units, *teach(model, units))  # the lens is perfect here
    bad = Affine(torch.randn(model.hidden_size, model.hidden_size), torch.zeros(model.hidden_size))
    fit = fit_head(model, bad, tokens, tokens, HeadSettings(epochs=1, learning_rate=1e-6))
    assert fit.start == "lens" and agreement(fit.choices, tokens.best_ids) == 1.0
    assert len(fit.curve) == 1, "it was trained although there is nothing to gain"


def test_the_share_that_leaves_counts_the_most_confident_first() -> None:
    best = torch.zeros(10, dtype=torch.int64)
    ids = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    found = Choices(ids, torch.linspace(1, 0.1, 10))
    assert share_leaving(found, best, 1.0) == 0.4
    assert share_leaving(found, best, 0.88) == 0.9, "8 of 9 agree"
    assert share_leaving(found, best, 0.8) == 1.0
    assert share_leaving(Choices(1 - ids, found.margins), best, 0.9) == 0.0
    none = torch.zeros(10, 0)
    tokens = Taught(none, best, none.long(), none)
    assert share_leaving_of_all(found, tokens, 1.0) == 0.4
    assert share_leaving_of_all(found, tokens, 0.9) == 0.9
    assert share_leaving_of_all(found, tokens, 0.8) == 1.0
    adapted = replace(tokens, kept=torch.arange(10) != 9)  # the last one is changed anyway
    assert share_leaving_of_all(found, adapted, 1.0) == 0.0
    assert share_leaving_of_all(found, adapted, 0.9) == 0.4
    assert share_leaving_of_all(found, adapted, 0.8) == 1.0
