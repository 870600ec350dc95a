"""From rows to a folder of fitted exits, on models whose exits are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.fitted import FittedExits, unit_state
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import ModelError, UsageError
from eevp_batch.tune.collect import collect
from eevp_batch.tune.fit import FitSettings, fit_collected, fit_exits, split_rows
from eevp_batch.tune.head_training import HeadSettings
from eevp_batch.tune.states import Row, forced_passes
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows, without_layers

QUICK = HeadSettings(epochs=2, batch=64)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> SegmentedModel:
    return SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, model: SegmentedModel) -> list[Row]:
    return make_rows(tiny_llama, model)


def test_the_last_layer_says_what_was_generated(model: SegmentedModel, rows: list[Row]) -> None:
    best = collect(model, rows, [2], prompt_bridge=False).taught[2].best_ids
    said = [forced.next_ids for forced in forced_passes(model, rows)]
    assert torch.equal(best, torch.cat(said))


@pytest.mark.parametrize("rank", [None, 20])
def test_a_fit_is_whole_and_survives_its_folder(
    model: SegmentedModel, rows: list[Row], tmp_path: Path, rank: int | None
) -> None:
    stages = []
    settings = FitSettings([2, 4], heads=QUICK, bridge_rank=rank, proposal_rank=16, tail=3)
    settings = replace(settings, shortlist=100)
    progress = lambda stage, done, total: stages.append((stage, done == total))  # noqa: E731
    fit_exits(model, "abc", rows, settings, {"source": "random"}, progress).save(tmp_path)
    found = FittedExits.load(tmp_path)
    assert (found.exit_layers, found.tail, found.model_hash) == ((2, 4), 3, "abc")
    assert set(found.heads) == {2, 4}
    assert set(found.bridges) == {("generated", 2), ("generated", 4), ("prompt", 2)}
    for (_, e), bridge in found.bridges.items():
        assert list(bridge.layers) == list(range(e + 1, NUM_LAYERS + 1))
        assert bridge.down is not None and bridge.down.shape == (rank or 21, 2 * 32 + 64)
        assert bridge.lift is not None and bridge.lift.shape == (64, 32), "twice the width at most"
    assert found.proposal is not None and found.proposal.right.shape == (16, 32)
    assert found.shortlist is not None and len(found.shortlist) == 100
    assert len(found.shortlist_with([1, int(found.shortlist[0])])) == 102
    data = found.facts["data"]
    assert (data["source"], data["rows"], data["held_out_rows"]) == ("random", 48, 12)
    assert {stage for stage, is_done in stages if is_done} >= {"states", "held-out states"}
    figures = found.facts["figures"]
    assert figures["heads"]["2"]["curve"][0]["epoch"] == 0
    assert 0 <= figures["proposal_recall"]["64"] <= figures["proposal_recall"]["256"] <= 1
    assert 0 < figures["shortlist_recall"]["100"] <= 1


def test_layers_that_add_nothing_are_found_out(tiny_llama: Path) -> None:
    model = without_layers(tiny_llama, after=3)
    rows = make_rows(tiny_llama, model)
    fit = fit_exits(model, "abc", rows, FitSettings([3], heads=QUICK, bridge_looks_back=False))
    figures = fit.facts["figures"]
    assert figures["heads"]["3"]["agreement"] == 1.0
    assert figures["heads"]["3"]["share_leaving_of_all"]["0.995"] == 1.0
    # Every layer behind reads the very state that the bridge is given, scale apart.
    for left in figures["bridges"]["generated.3"]["unexplained_variance"].values():
        assert left < 1e-4
    held_out = split_rows(rows, 0.2, 0)[1]
    for forced in forced_passes(model, held_out):
        states = dict(forced.layers())
        units = unit_state(states[3], model.norm_eps)
        for layer in (4, 5, 6):
            expected = model.layers.kv_of(layer - 1, states[layer - 1])
            found = fit.bridges["generated", 3].layers[layer](units)
            torch.testing.assert_close(
                found[forced.generated], expected[forced.generated], atol=0.02, rtol=0.02
            )


def test_kinds_of_tokens_are_fitted_apart(model: SegmentedModel, rows: list[Row]) -> None:
    seen = collect(model, rows, [2, 4])
    beginnings = {
        tuple(row.prompt_ids[: n + 1]) for row in rows for n in range(len(row.prompt_ids))
    }
    num_prompt = len(beginnings)
    assert num_prompt < sum(len(row.prompt_ids) for row in rows), "some first tokens are shared"
    num_generated = sum(len(row.generated_ids) - 1 for row in rows)
    assert seen.bridges["prompt", 2].count == num_prompt
    assert seen.bridges["generated", 2].count == num_generated
    assert seen.bridges["generated", 4].count == num_generated
    assert len(seen.taught[2]) == seen.heads[2].count == num_generated + len(rows)


def test_two_replicas_sum_to_what_one_would_have(model: SegmentedModel, rows: list[Row]) -> None:
    whole = collect(model, rows, [2])
    both = collect(model, rows[:9], [2]) + collect(model, rows[9:], [2])
    for sums, expected in (
        (both.bridges["generated", 2], whole.bridges["generated", 2]),
        (both.heads[2], whole.heads[2]),
    ):
        torch.testing.assert_close(sums.xx, expected.xx, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sums.xy[6], expected.xy[6], rtol=1e-4, atol=1e-3)
    assert sorted(both.taught[2].best_ids) == sorted(whole.taught[2].best_ids)
    assert len(both.taught[2].units) == len(whole.taught[2])
    settings = FitSettings([2], heads=QUICK)
    fit_collected(model, "abc", both, whole, settings)


def test_rows_are_held_out_by_seed(rows: list[Row]) -> None:
    fitting, held_out = split_rows(rows, 0.25, 1)
    assert len(held_out) == 15 and len(fitting) == 45
    assert {id(row) for row in [*fitting, *held_out]} == {id(row) for row in rows}
    assert split_rows(rows, 0.25, 1) == (fitting, held_out)
    assert split_rows(rows, 0.25, 2) != (fitting, held_out)


def test_what_cannot_be_fitted_is_refused(model: SegmentedModel, rows: list[Row]) -> None:
    with pytest.raises(UsageError, match="found 1; allowed: two or more"):
        fit_exits(model, "abc", rows[:1], FitSettings([2]))
    with pytest.raises(ModelError, match="exit layers"):
        fit_exits(model, "abc", rows, FitSettings([2, NUM_LAYERS]))
    silent = [Row(row.prompt_ids, row.generated_ids[:1]) for row in rows]
    with pytest.raises(UsageError, match="generated tokens"):
        fit_exits(model, "abc", silent, FitSettings([2]))
