"""Thresholds are certified where exits are known to agree, and refused where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eevp_batch.calibration_file import Calibration
from eevp_batch.engine.cut import CutModel, end_ids
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import CalibrationError, UsageError
from eevp_batch.spec import DecaySpec, EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from eevp_batch.tune.bounds import least_rows
from eevp_batch.tune.calibrate import calibrate
from eevp_batch.tune.candidates import NEVER, candidate_grid
from eevp_batch.tune.free_run import FreeRuns, SequenceRisk, confirm, load_metric
from eevp_batch.tune.replay import Replay, ReplaySettings, Thresholds
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.test_calibration_file import some_binding
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows, without_layers

SAMPLING = SamplingSpec(max_new_tokens=20)
EXIT = ExitSpec(layers=[3], vocab=VocabSpec(top_k=32))
COSTS = Costs(
    num_layers=NUM_LAYERS,
    layer=1.0,
    head=2.0,
    proposal=1.0,
    rescoring=0.1,
    exit_head=0.1,
    bridge=0.1,
)
LOOSE = {"delta": 0.05, "epsilon": 0.1, "costs": COSTS}


def settings_for(exit: ExitSpec, layers: Sequence[int]) -> ReplaySettings:
    return ReplaySettings(exit, SAMPLING, layers[0], always_kept=[1])


@pytest.fixture(scope="module")
def agreeing(tiny_llama: Path) -> tuple[SegmentedModel, list[Row]]:
    """A model whose layers behind the third add nothing, cut there, and what it generates."""
    model = without_layers(tiny_llama, after=3)
    return model.recut([3, NUM_LAYERS]), make_rows(tiny_llama, model, count=160)


@pytest.fixture(scope="module")
def random_model(tiny_llama: Path) -> tuple[SegmentedModel, list[Row]]:
    model = SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])
    return model, make_rows(tiny_llama, model, count=160)


def runs_of(path: Path, model: SegmentedModel, exit: ExitSpec = EXIT) -> FreeRuns:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = end_ids(load_model(path), tokenizer)
    cut = CutModel(model, model.exit_layers[0], None, None, ends, 256)
    limits = EngineSpec(max_batch=8, max_resident=16)
    return FreeRuns(cut, tokenizer, exit, SAMPLING, limits)


def test_exits_that_agree_are_certified(agreeing: tuple[SegmentedModel, list[Row]]) -> None:
    model, rows = agreeing
    result = calibrate(model, settings_for(EXIT, [3]), rows[:40], rows[40:], grid=8, **LOOSE)
    chosen = result.chosen
    assert chosen is not None, result.reason
    assert chosen.exit_share > 0.99, "nearly every token leaves"
    assert chosen.calibration_risk == 0 and (chosen.p_value or 1) <= 0.1
    assert chosen.mean_layer == pytest.approx(3, abs=0.05)
    assert chosen.speed == pytest.approx(COSTS.full_depth / (3 + 1.2 + 0.3), rel=0.05)
    binding = some_binding(exit_layers=(3, NUM_LAYERS))
    written = result.to_calibration(binding, {"rows": "random"})
    assert Calibration.from_json(written.to_json(), "here") == written
    assert written.thresholds == chosen.thresholds and written.num_rows == 120


def test_too_few_rows_are_told_and_not_looked_at(
    random_model: tuple[SegmentedModel, list[Row]],
) -> None:
    model, rows = random_model
    cut = model.recut([3, NUM_LAYERS])
    result = calibrate(
        cut, settings_for(EXIT, [3]), rows[:40], rows[40:], delta=0.01, epsilon=0.05, costs=COSTS
    )
    assert result.chosen is None and result.rows_needed == least_rows("betting", 0.01, 0.05)
    assert result.rows_needed > 120 and f"{result.rows_needed} are the fewest" in str(result.reason)
    assert all(setting.calibration_risk is None for setting in result.settings)
    with pytest.raises(CalibrationError, match="nothing was certified: 120 calibration rows"):
        result.to_calibration(some_binding(), {})


@pytest.mark.parametrize("layers", [[3], [2, 4]])
@pytest.mark.parametrize("kv", ["propagate", "recompute"])
def test_what_is_certified_is_below_delta_and_what_is_bolder_failed(
    layers: list[int], kv: str, random_model: tuple[SegmentedModel, list[Row]]
) -> None:
    model, rows = random_model
    exit = EXIT.model_copy(update={"layers": layers, "kv": kv})
    cut, settings = model.recut([*layers, NUM_LAYERS]), settings_for(exit, layers)
    result = calibrate(
        cut, settings, rows[:40], rows[40:], delta=0.2, epsilon=0.1, costs=COSTS, grid=10
    )
    reference, *grid = result.settings
    assert set(reference.thresholds) == {NEVER} and reference.tuning_risk == 0
    assert reference.speed == 1 and reference.place is None
    path = sorted((s for s in grid if s.place is not None), key=lambda s: s.place or 0)
    assert len(path) > 2, "or nothing is shown"
    for one, other in itertools.pairwise(path):
        assert one.tuning_risk < other.tuning_risk and one.cost > other.cost
    assert result.chosen is not None, result.reason
    place = result.chosen.place or 0
    for setting in path[: place + 1]:
        assert setting.p_value is not None and setting.p_value <= 0.1
        assert (setting.calibration_risk or 0) < 0.2 and (setting.bound or 0) < 0.25
    bolder = path[place + 1]
    assert bolder.p_value is not None and bolder.p_value > 0.1
    # The figures are those of a replay of these very thresholds.
    again = Replay(cut, settings).run(rows[40:], [result.chosen.thresholds])[0]
    losses = [
        sum(a != b for a, b in zip(one.token_ids, row.generated_ids, strict=True))
        / len(row.generated_ids)
        for one, row in zip(again, rows[40:], strict=True)
    ]
    assert result.chosen.calibration_risk == pytest.approx(sum(losses) / len(losses))


class Fixed:
    """Rows lose the same under every setting."""

    kind = "token"
    metric = None

    def __init__(self, losses: Sequence[float]) -> None:
        self.per_row = list(losses)

    def losses(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[float]]:
        return [self.per_row[: len(rows)] for _ in grid]


@pytest.mark.parametrize(
    ("losses", "complaint", "has_number"),
    [
        ([0.3] * 120, "not below delta, 0.05: no number of rows", False),
        ([0.04] * 120, "rows like these would certify it, 120 are given", True),
    ],
)
def test_a_failure_says_why(
    losses: list[float],
    complaint: str,
    has_number: bool,
    agreeing: tuple[SegmentedModel, list[Row]],
) -> None:
    model, rows = agreeing
    risk = Fixed(losses)
    result = calibrate(
        model, settings_for(EXIT, [3]), rows[:40], rows[40:], risk=risk, grid=4, **LOOSE
    )
    assert result.chosen is None and complaint in str(result.reason)
    assert (result.rows_needed is not None) == has_number
    if result.rows_needed is not None:
        assert result.rows_needed > 120


def test_rows_of_another_machine_are_told(agreeing: tuple[SegmentedModel, list[Row]]) -> None:
    """One of a row's tokens came out otherwise there; exits are not to blame."""
    model, rows = agreeing
    foreign = [
        Row(row.prompt_ids, [*row.generated_ids[:-1], 3 + (row.generated_ids[-1] - 2) % 300])
        for row in rows
    ]
    changed = sum(1 / len(row.generated_ids) for row in rows[:40]) / 40
    settings = settings_for(EXIT, [3])
    result = calibrate(model, settings, foreign[:40], foreign[40:], grid=4, **LOOSE)
    assert result.settings[0].tuning_risk == pytest.approx(changed) and changed > 0.04
    assert f"{changed:.4f} of the tuning rows' tokens differ with exits off" in str(result.reason)
    own = calibrate(model, settings, rows[:40], rows[40:], risk=Fixed([0.3] * 120), grid=4, **LOOSE)
    assert "exits off" not in str(own.reason), "these rows are its own"


def test_a_pruned_end_is_part_of_the_risk(random_model: tuple[SegmentedModel, list[Row]]) -> None:
    """Even where nobody leaves: the last layer's token is often not among four of 320 ids."""
    model, rows = random_model
    vocab = VocabSpec(top_k=4, final_head="pruned")
    exit = EXIT.model_copy(update={"vocab": vocab})
    cut, costs = model.recut([3, NUM_LAYERS]), replace(COSTS, final_k=4)
    settings = settings_for(exit, [3])
    result = calibrate(
        cut, settings, rows[:40], rows[40:], delta=0.9, epsilon=0.1, costs=costs, grid=8
    )
    reference, *grid = result.settings
    assert reference.tuning_risk == 0 and reference.speed == 1, "exits off, nothing is pruned"
    never = next(setting for setting in grid if set(setting.thresholds) == {NEVER})
    assert never.cost == pytest.approx(costs.with_exits([3], [0.0])) and never.exit_share == 0
    lost = 0.0
    [replayed] = Replay(cut, settings).run(rows[:40], [[NEVER]])
    for row, found in zip(rows[:40], replayed, strict=True):
        wrong = [a != b for a, b in zip(row.generated_ids, found.token_ids, strict=True)]
        lost += sum(wrong) / len(wrong) / 40
    assert never.tuning_risk == pytest.approx(lost) and lost > 0.3
    assert never.calibration_risk == pytest.approx(lost, abs=0.1)


def test_candidates_spread_over_costs(random_model: tuple[SegmentedModel, list[Row]]) -> None:
    model, rows = random_model
    cut = model.recut([2, 4, NUM_LAYERS])
    for decay in (None, DecaySpec(temperature=4.0)):
        exit = EXIT.model_copy(update={"layers": [2, 4], "decay": decay})
        grid = candidate_grid(cut, settings_for(exit, [2, 4]), rows[:30], COSTS, 0.1, 12)
        assert len(set(grid)) == len(grid) <= 12 and len(grid) > 6
        assert all(len(thresholds) == 2 and min(thresholds) >= 0 for thresholds in grid)
        found = Replay(cut, settings_for(exit, [2, 4])).run(rows[:30], grid)
        layers = [[layer for one in some for layer in one.exit_layers] for some in found]
        means = [sum(some) / len(some) for some in layers]
        assert means[0] > 5.5 and means[-1] < 3, "from hardly any exit to nearly all"


def test_sequences_are_judged_by_free_runs(
    tiny_llama: Path, agreeing: tuple[SegmentedModel, list[Row]]
) -> None:
    model, rows = agreeing
    runs = runs_of(tiny_llama, model)
    for metric in ("edit", "diverged", "operator:ne"):
        assert SequenceRisk(runs, metric).losses(rows[:6], [[0.0], [NEVER]]) == [[0.0] * 6] * 2
    result = calibrate(
        model,
        settings_for(EXIT, [3]),
        rows[:40],
        rows[40:],
        risk=SequenceRisk(runs, "edit"),
        grid=4,
        **LOOSE,
    )
    assert result.chosen is not None and result.chosen.exit_share > 0.99
    assert (result.risk, result.metric) == ("sequence", "edit")


def test_what_exits_change_shows_in_free_runs(
    tiny_llama: Path, random_model: tuple[SegmentedModel, list[Row]]
) -> None:
    model, rows = random_model
    runs = runs_of(tiny_llama, model.recut([3, NUM_LAYERS]))
    never, always = (confirm(runs, rows[:30], [bar], rounds=1) for bar in (NEVER, 0.0))
    assert never.identical == never.before_divergence == 1 and never.edit_distance == 0
    assert never.identical_interval[0] < 1 and never.exit_share == 0
    assert always.identical < 0.5 and always.before_divergence < 0.5 < always.edit_distance
    assert always.exit_share == 1 and always.mean_layer == 3
    low, high = always.before_divergence_interval
    assert low <= always.before_divergence <= high
    assert never.speed == never.tokens_per_s_on / never.tokens_per_s_off
    losses = SequenceRisk(runs, "operator:ne").losses(rows[:30], [[0.0]])[0]
    assert set(losses) == {0.0, 1.0} or set(losses) == {1.0}


@pytest.mark.parametrize("name", ["nonsense", "nomodule_here:f", "operator:nothing", "math:pi"])
def test_a_metric_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="metric: found"):
        load_metric(name)


def test_a_metric_out_of_range_is_refused(
    tiny_llama: Path, agreeing: tuple[SegmentedModel, list[Row]]
) -> None:
    model, rows = agreeing
    lengths = SequenceRisk(runs_of(tiny_llama, model), "tests.tune.distances:total_length")
    with pytest.raises(CalibrationError, match="allowed: 0 to 1"):
        lengths.losses(rows[:2], [[0.5]])


def test_what_cannot_be_calibrated_is_refused(agreeing: tuple[SegmentedModel, list[Row]]) -> None:
    model, rows = agreeing
    settings = settings_for(EXIT, [3])
    with pytest.raises(CalibrationError, match="last layer alone"):
        calibrate(model.recut([NUM_LAYERS]), settings, rows, rows, **LOOSE)
    with pytest.raises(CalibrationError, match="calibration rows: found none"):
        calibrate(model, settings, rows, [], **LOOSE)
    sampled = replace(settings, sampling=SamplingSpec(temperature=0.5))
    with pytest.raises(UsageError, match="where exits are replayed"):
        calibrate(model, sampled, rows, rows, **LOOSE)


@pytest.mark.parametrize("kind", ["betting", "hoeffding_bentkus"])
def test_the_fewest_rows_are_the_fewest(kind: str) -> None:
    from eevp_batch.tune.bounds import p_value

    least = least_rows(kind, 0.05, 0.1)  # type: ignore[arg-type]
    for count, passes in ((least, True), (least - 1, False)):
        value = p_value(kind, [0.0] * count, 0.05, epsilon=0.1, seed=0)  # type: ignore[arg-type]
        assert (value <= 0.1) == passes
