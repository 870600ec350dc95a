"""MLP heads: they begin as the affine head, learn what none of those can, and run as replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.fitted import MlpHead, unit_state
from eevp_batch.engine.load import build_engine
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import UsageError
from eevp_batch.records import Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from eevp_batch.tune.calibrate_job import job_costs
from eevp_batch.tune.fit import FitSettings, fit_exits
from eevp_batch.tune.head_training import HeadSettings, WhitenedHead, fit_head
from eevp_batch.tune.heads import Taught, agreement, identity_head, teach
from eevp_batch.tune.replay import Replay, ReplaySettings
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model, needs_vnni, run
from tests.engine.test_exit_heads import random_head
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows

SAMPLING = SamplingSpec(max_new_tokens=16)
LAYERS = [2, 4]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> SegmentedModel:
    return SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])


def product(model: SegmentedModel, count: int, seed: int) -> Taught:
    """Tokens that are one of two ids, by the sign of the product of two numbers of their state."""
    generator = torch.Generator().manual_seed(seed)
    units = unit_state(torch.randn(count, model.hidden_size, generator=generator), model.norm_eps)
    sides = (units[:, 0] * units[:, 1]).sign()[:, None]
    directions = model.head_weight[[100, 200]] / model.norm_weight
    hidden = torch.where(sides > 0, directions[0], directions[1])
    return Taught(units, *teach(model, hidden))


def test_an_mlp_learns_a_product_and_no_affine_head_does(model: SegmentedModel) -> None:
    tokens, held_out = product(model, 4000, 2), product(model, 600, 3)
    assert len(set(held_out.best_ids.tolist())) == 2
    start = identity_head(model.hidden_size, model.device)
    settings = HeadSettings(epochs=12, batch=64, learning_rate=1e-2, patience=12)
    share = {}
    for width in (None, 32):
        fit = fit_head(model, start, tokens, held_out, replace(settings, mlp_width=width))
        assert isinstance(fit.head, MlpHead) == (width is not None)
        share[width] = agreement(fit.choices, held_out.best_ids)
    # Where an affine head says one id is convex, and so is where it says the other.
    assert share[None] < 0.75 and share[32] > 0.85, share


def test_training_begins_at_the_affine_head(model: SegmentedModel) -> None:
    width = model.hidden_size
    start, units = random_head(width).affine, torch.randn(50, width)
    begun = WhitenedHead(start, units, mlp_width=7)
    head = begun.head()
    assert isinstance(head, MlpHead) and head.width == 7
    assert torch.equal(head(units), start(units))
    affine = WhitenedHead(start, units)
    assert torch.equal(begun.normed(model, units), affine.normed(model, units))
    assert [p.shape for p in begun.parameters[2:]] == [(7, width), (7,), (width, 7)]


def test_what_is_trained_is_what_comes_out(model: SegmentedModel) -> None:
    """The head that reads whitened inputs and the one that reads unit states say the same."""
    units = torch.randn(50, model.hidden_size)
    training = WhitenedHead(random_head(model.hidden_size).affine, units, mlp_width=7)
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = training.normed(model, units).detach()
    torch.testing.assert_close(
        model.normed(units + training.head()(units)), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("width", [0, -3])
def test_an_mlp_without_units_is_refused(width: int) -> None:
    with pytest.raises(UsageError, match=f"mlp_width: found {width}; allowed: 1 or more, or None"):
        HeadSettings(mlp_width=width)


class Fitted:
    """Exits of a tiny model with random MLP heads, read from their folder."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        model = SegmentedModel(load_model(path), [NUM_LAYERS])
        settings = FitSettings(LAYERS, heads=HeadSettings(epochs=0), proposal_rank=16, tail=2)
        fitted = fit_exits(model, "abc", make_rows(path, model), replace(settings, shortlist=100))
        heads = {layer: random_head(model.hidden_size, 6, seed=layer) for layer in LAYERS}
        replace(fitted, heads=heads).save(folder)

    def spec(self, **fields: Any) -> ExitSpec:
        return ExitSpec(layers=LAYERS, threshold=[0.5, 0.5], heads=str(self.folder), **fields)


@pytest.fixture(scope="module")
def fitted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return Fitted(tiny_llama, tmp_path_factory.mktemp("fitted"))


CASES = [
    {"kv": "propagate"},
    {"kv": "bridge", "prefill": "bridge"},
    {"kv": "bridge", "vocab": VocabSpec(top_k=32, proposal="low_rank")},
    {"kv": "bridge", "vocab": VocabSpec(top_k=32, proposal="shortlist")},
    pytest.param({"vocab": VocabSpec(top_k=32, proposal="int8")}, marks=needs_vnni),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_engine_does_what_is_replayed(
    fitted: Fitted, case: dict[str, Any], prompts: list[Prompt]
) -> None:
    exits = fitted.spec(**{"vocab": VocabSpec(top_k=32), **case})
    tokenizer = AutoTokenizer.from_pretrained(fitted.path)
    limits = EngineSpec(max_batch=5, max_resident=15)
    engine = build_engine(load_model(fitted.path), tokenizer, exits, SAMPLING, limits)
    engine_said = run(engine, prompts)
    cut = cut_model(load_model(fitted.path), tokenizer, exits)
    ends, short = sorted(cut.end_ids), cut.short_prompt
    settings = ReplaySettings(exits, SAMPLING, cut.prune_layer, ends, cut.proposal, short)
    rows = [Row(p.token_ids, engine_said[p.row_id, 0].token_ids) for p in prompts]
    thresholds = exits.threshold
    assert isinstance(thresholds, list)
    replayed = Replay(cut.model, settings, 300).run(rows, [thresholds])[0]
    for prompt, found in zip(prompts, replayed, strict=True):
        expected = engine_said[prompt.row_id, 0]
        assert found.token_ids == expected.token_ids
        assert found.exit_layers == [exit.exit_layer for exit in expected.exits]
    seen = {layer for found in replayed for layer in found.exit_layers}
    assert seen == {*LAYERS, NUM_LAYERS}, "tokens leave everywhere, or nothing is shown"


def test_the_width_is_known_where_costs_are_measured(fitted: Fitted) -> None:
    exits = fitted.spec(kv="bridge", vocab=VocabSpec(top_k=32))
    cut = cut_model(load_model(fitted.path), AutoTokenizer.from_pretrained(fitted.path), exits)
    assert cut.model.head_mlp_width == 6
    assert job_costs(cut, exits, [Row([3, 4, 5], [6])]).exit_head > 0
