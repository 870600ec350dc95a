"""Exits are put where the predicted cost is least, and never bolder than allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eevp_batch.tune.search import Costs, LayerTable, boldest, search_exits

COSTS = Costs(
    num_layers=12, layer=1.0, head=4.0, proposal=1.5, rescoring=0.5, exit_head=0.1, bridge=0.05
)


def table(share_right: float, count: int = 1000, sharp: bool = True) -> LayerTable:
    """Confidence tells right from wrong perfectly where it is sharp, not at all elsewhere."""
    agrees = torch.arange(count) < share_right * count
    spread = torch.linspace(0.9, 0.1, count)
    return LayerTable(spread if sharp else spread.flip(0), agrees)


def test_cost_of_full_depth_and_of_an_exit_nobody_takes() -> None:
    assert COSTS.full_depth == 16.0
    assert COSTS.with_exits([3], [0.0]) == pytest.approx(16.0 + 0.1 + 1.5)
    everyone = 3 + 0.1 + 1.5 + 9 * 0.05
    assert COSTS.with_exits([3], [1.0]) == pytest.approx(everyone)
    half_each = 3 + 0.1 + 1.5 + 0.5 * 9 * 0.05 + 0.5 * (3 + 0.1 + 0.5) + 0.5 * 6 * 0.05
    assert COSTS.with_exits([3, 6], [0.5, 0.5]) == pytest.approx(half_each)


def test_prompt_tokens_take_their_layers_with_exits_too() -> None:
    beside = replace(COSTS, prompts=2.0)
    assert beside.full_depth == 16.0 + 2 * 12
    generated = COSTS.with_exits([3, 6], [0.5, 0.5])
    assert beside.with_exits([3, 6], [0.5, 0.5]) == pytest.approx(generated + 2 * 12)
    bridged = replace(beside, bridges_prompts=True)
    expected = generated + 2 * (3 + 9 * 0.05)
    assert bridged.with_exits([3, 6], [0.5, 0.5]) == pytest.approx(expected)
    assert bridged.full_depth == beside.full_depth


def test_who_stays_is_scored_on_the_kept_ids_where_the_job_says_so() -> None:
    pruned = replace(COSTS, final_k=9)
    assert pruned.full_depth == COSTS.full_depth, "exits off, nothing is pruned"
    saved = COSTS.head - COSTS.rescoring
    for layers, shares in (([3], [0.0]), ([3, 6], [0.5, 0.2])):
        staying = 1 - sum(shares)
        expected = COSTS.with_exits(layers, shares) - staying * saved
        assert pruned.with_exits(layers, shares) == pytest.approx(expected)


def test_the_boldest_threshold_lets_so_many_wrong_ones_through() -> None:
    confidences = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    agrees = torch.tensor([True, False, True, False, True])
    assert boldest(confidences, agrees, 0) == pytest.approx(0.8)
    assert boldest(confidences, agrees, 1) == pytest.approx(0.6)
    assert boldest(confidences, agrees, 2) == 0.0


def test_the_earliest_layer_that_is_sure_enough_wins() -> None:
    tables = {2: table(0.1, sharp=False), 4: table(0.95), 8: table(0.99)}
    best = search_exits(tables, COSTS, target=0.99, most_exits=1)[0]
    assert best.layers == (4,)
    assert best.shares == (pytest.approx(0.96),) and best.disagreement == pytest.approx(0.01)
    assert best.speed == pytest.approx(16 / COSTS.with_exits([4], [0.96]))


def test_two_exits_where_one_leaves_much_over() -> None:
    tables = {3: table(0.5), 6: table(0.99)}
    found = search_exits(tables, COSTS, target=0.99)
    assert found[0].layers == (3, 6)
    assert found[0].disagreement <= 0.01
    assert {choice.layers for choice in found} == {(), (3,), (6,), (3, 6)}


def test_bridged_prompts_move_no_exit_but_count_in_its_speed() -> None:
    """What they change is not known yet, so that an early exit must not pay by them alone."""
    tables = {1: table(0.0), 4: table(0.95), 8: table(0.99)}
    beside = replace(COSTS, prompts=5.0)
    bridged = replace(beside, bridges_prompts=True)
    plain, moved = (search_exits(tables, costs, 0.99, 1) for costs in (beside, bridged))
    assert [c.layers for c in moved] == [c.layers for c in plain] and moved[0].layers == (4,)
    assert moved[0].speed == bridged.full_depth / bridged.with_exits([4], moved[0].shares)
    assert moved[0].speed > plain[0].speed


def test_no_exit_where_none_pays() -> None:
    wrong = {layer: table(0.05, sharp=False) for layer in range(1, 12)}
    best = search_exits(wrong, COSTS, target=0.99)[0]
    assert best.layers == () and best.speed == 1.0
    dear = Costs(12, 1.0, 40.0, 40.0, 0.5, 0.1, 0.05)
    assert search_exits({11: table(0.95)}, dear)[0].layers == (), "a head costs forty layers"


def test_what_is_not_kept_at_the_first_exit_is_wrong_once() -> None:
    """Four tokens in a thousand can no longer be right: two would have left wrong, two stay."""
    whole = table(0.99)
    kept = torch.ones(1000, dtype=torch.bool)
    kept[[-1, -2, 0, 1]] = False
    found = search_exits({4: replace(whole, kept=kept)}, COSTS, target=0.99, most_exits=1)
    [one] = [choice for choice in found if choice.layers]
    assert one.disagreement == pytest.approx(0.01)
    # Ten may be wrong: the four, and six of the eight others that do not agree.
    assert one.shares == (pytest.approx(0.99 + 0.006),)


def test_an_exit_that_keeps_too_little_comes_second_at_best() -> None:
    poor, good = torch.arange(1000) >= 20, torch.ones(1000, dtype=torch.bool)
    tables = {3: replace(table(0.5), kept=poor), 6: replace(table(0.99), kept=good)}
    tables[8] = replace(tables[6], kept=poor)
    layers = {choice.layers for choice in search_exits(tables, COSTS, target=0.99)}
    assert layers == {(), (6,), (6, 8)}


@pytest.mark.parametrize("target", [0.9, 0.99, 1.0])
def test_the_target_is_kept(target: float) -> None:
    torch.manual_seed(0)
    tables = {}
    for layer in range(1, 12):
        agrees = torch.rand(500) < layer / 12
        tables[layer] = LayerTable(torch.rand(500) * 0.5 + 0.4 * agrees, agrees)
    for choice in search_exits(tables, COSTS, target):
        assert choice.disagreement <= 1 - target + 1e-9
