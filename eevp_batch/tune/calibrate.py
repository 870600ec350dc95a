"""Thresholds with a certificate: candidates, a path through them, and the test along it.

Two splits of rows. The *tuning* rows say which thresholds are worth trying, what each would cost
and risk, and in which order to test them; the *calibration* rows, looked at only afterwards and
only as far as the test goes, decide (see `certify`). Knows replays, losses and costs; nothing of
files, prompts or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from eevp_batch.calibration_file import RiskKind
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind
from eevp_batch.tune.bounds import (
    Losses,
    least_rows,
    p_value,
    rows_needed,
    rows_needed_by_betting,
)
from eevp_batch.tune.bounds import share_interval as interval
from eevp_batch.tune.calibration_result import CalibrationResult, Setting
from eevp_batch.tune.candidates import NEVER, candidate_grid
from eevp_batch.tune.certify import certify, order_path
from eevp_batch.tune.replay import Replay, Replayed, ReplaySettings, Thresholds
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row
from eevp_batch.tune.text_distance import disagreement

GRID = 24
"""Settings that are replayed on the tuning rows."""
_TESTED_AT_ONCE = 4
"""Settings of the path that share a pass over the calibration rows; the last few may be wasted."""
_FOREIGN = 0.1
"""Share of delta that may differ with exits off before it is said: it ought to be nothing."""


class Risk(Protocol):
    """What a row can lose by exits.

    Attributes:
        kind: as in the calibration file.
        metric: name of a distance of whole outputs; None where tokens are compared.
    """

    kind: RiskKind
    metric: str | None

    def losses(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[float]]:
        """Loss in [0, 1] of every row, under every setting."""


class TokenRisk:
    """Share of a row's tokens that would leave as others than at full depth, the text given."""

    kind: RiskKind = "token"
    metric: str | None = None

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def losses(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[float]]:
        """See `Risk`."""
        return [_token_losses(rows, found) for found in self._replay.run(rows, grid)]


def calibrate(
    model: SegmentedModel,
    settings: ReplaySettings,
    tuning: Sequence[Row],
    calibration: Sequence[Row],
    *,
    delta: float,
    epsilon: float,
    costs: Costs,
    kind: PValueKind = "betting",
    grid: int = GRID,
    risk: Risk | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> CalibrationResult:
    """Find the cheapest thresholds with P(risk > delta) <= epsilon.

    Args:
        model: cut at the exit layers, its fitted exits in use.
        settings: of the job.
        tuning: rows that choose and order the thresholds; those of a fit may serve.
        calibration: rows that nothing has been fitted to or chosen by, drawn as the job's are.
        delta: bound on the mean loss of a row.
        epsilon: probability with which the risk may be higher.
        costs: of this model, see `measured_costs`.
        kind: the p-value.
        grid: settings to look at.
        risk: what a row loses; its differing tokens.
        seed: see `bounds.betting`.
        say: progress.

    Raises:
        UsageError: the job cannot be replayed.
        CalibrationError: no exit before the last layer, no rows, or delta or epsilon out of range.
    """
    _check(model, tuning, calibration)
    least = least_rows(kind, delta, epsilon, seed)
    replay = Replay(model, settings)
    risk = risk or TokenRisk(replay)
    costs = _costs_of(settings, costs)
    say(f"choosing thresholds by {len(tuning)} rows")
    found = _tuned(replay, model, settings, tuning, costs, delta, grid)
    path = order_path([s.tuning_risk for s in found[1:]], [s.cost for s in found[1:]])
    order = [index + 1 for index in path]
    result = CalibrationResult(
        delta=delta,
        epsilon=epsilon,
        p_value_kind=kind,
        risk=risk.kind,
        metric=risk.metric,
        num_tuning_rows=len(tuning),
        num_rows=len(calibration),
        exit_layers=model.exit_layers,
        settings=tuple(
            replace(s, place=order.index(n) if n in order else None) for n, s in enumerate(found)
        ),
        certified=None,
    )
    if len(calibration) < least:
        reason = (
            f"{len(calibration)} calibration rows cannot show a risk of at most {delta:g} at "
            f"epsilon {epsilon:g}, whatever they hold; {least} are the fewest that could"
        )
        return replace(result, reason=reason, rows_needed=least)
    return _tested(result, order, risk, calibration, seed, say)


def _check(model: SegmentedModel, tuning: Sequence[Row], calibration: Sequence[Row]) -> None:
    """Refuse what leaves nothing to choose or nothing to test by."""
    if len(model.exit_layers) < 2:
        raise CalibrationError("exit.layers: found the last layer alone; allowed: one before it")
    for name, rows in (("tuning", tuning), ("calibration", calibration)):
        if not rows:
            raise CalibrationError(f"{name} rows: found none; allowed: one or more")


def _costs_of(settings: ReplaySettings, costs: Costs) -> Costs:
    """What is skipped is only put off where keys and values end up exact: it runs later."""
    put_off = settings.exits.kv in ("recompute", "verify")
    return replace(costs, bridge=costs.layer) if put_off else costs


def _token_losses(rows: Sequence[Row], found: Sequence[Replayed]) -> list[float]:
    return [
        disagreement(one.token_ids, row.generated_ids) for one, row in zip(found, rows, strict=True)
    ]


def _tuned(
    replay: Replay,
    model: SegmentedModel,
    settings: ReplaySettings,
    rows: Sequence[Row],
    costs: Costs,
    delta: float,
    count: int,
) -> list[Setting]:
    """The grid as the tuning rows see it; first the setting without exits, where nobody asks."""
    early = model.exit_layers[:-1]
    never = (NEVER,) * len(early)
    [whole] = Replay(model, _choosing_from_all(settings)).run(rows, [never])
    without = _setting(never, early, costs, rows, whole)
    found = [replace(without, cost=costs.full_depth, speed=1.0)]
    grid = candidate_grid(model, settings, rows, costs, delta, count)
    for thresholds, replayed in zip(grid, replay.run(rows, grid), strict=True):
        found.append(_setting(thresholds, early, costs, rows, replayed))
    return found


def _choosing_from_all(settings: ReplaySettings) -> ReplaySettings:
    """The same with the last layer choosing from the whole vocabulary."""
    vocab = settings.exits.vocab.model_copy(update={"final_head": "full"})
    return replace(settings, exits=settings.exits.model_copy(update={"vocab": vocab}))


def _setting(
    thresholds: Thresholds,
    early: Sequence[int],
    costs: Costs,
    rows: Sequence[Row],
    replayed: Sequence[Replayed],
) -> Setting:
    """What a replay of some rows shows of a setting with some exit layers before the last."""
    layers = [layer for one in replayed for layer in one.exit_layers]
    shares = tuple(layers.count(layer) / len(layers) for layer in early)
    cost = costs.with_exits(early, shares)
    losses = _token_losses(rows, replayed)
    return Setting(
        thresholds=tuple(thresholds),
        shares=shares,
        mean_layer=sum(layers) / len(layers),
        cost=cost,
        speed=costs.full_depth / cost,
        tuning_risk=sum(losses) / len(losses),
    )


def _tested(
    result: CalibrationResult,
    order: Sequence[int],
    risk: Risk,
    rows: Sequence[Row],
    seed: int,
    say: Callable[[str], None],
) -> CalibrationResult:
    """Go along the path until a setting fails."""
    settings = list(result.settings)
    tested: list[Losses] = []

    def losses() -> Iterator[Losses]:
        for start in range(0, len(order), _TESTED_AT_ONCE):
            some = order[start : start + _TESTED_AT_ONCE]
            say(f"testing settings {start + 1} to {start + len(some)} of {len(order)}")
            for found in risk.losses(rows, [settings[index].thresholds for index in some]):
                tested.append(found)
                yield found

    levels = result.delta, result.epsilon
    last = certify(losses(), *levels, kind=result.p_value_kind, seed=seed)
    for index, found in zip(order, tested, strict=False):
        upper = interval(found, [1.0] * len(found), largest=1.0, level=1 - 2 * result.epsilon)[1]
        settings[index] = replace(
            settings[index],
            calibration_risk=sum(found) / len(found),
            p_value=p_value(
                result.p_value_kind, found, result.delta, epsilon=result.epsilon, seed=seed
            ),
            bound=upper,
        )
    result = replace(result, settings=tuple(settings))
    if last is None:
        reason, needed = _why_none(result, tested[0])
        return replace(result, reason=reason, rows_needed=needed)
    return replace(result, certified=order[last])


def _why_none(result: CalibrationResult, losses: Losses) -> tuple[str, int | None]:
    """Why the first setting of the path failed, and how many rows would do."""
    mean = sum(losses) / len(losses)
    delta, epsilon = result.delta, result.epsilon
    by_betting = result.p_value_kind == "betting"
    needed = (
        rows_needed_by_betting(losses, delta, epsilon)
        if by_betting
        else rows_needed(delta, epsilon, mean)
    )
    said = f"the most cautious thresholds have a risk of {mean:.4f} on the calibration rows"
    without = result.settings[0].tuning_risk
    if without > _FOREIGN * delta:
        said += (
            f" ({without:.4f} of the tuning rows' tokens differ with exits off: these rows were "
            "generated on another machine or by another version; generate them again)"
        )
    if mean >= delta:
        return f"{said}, not below delta, {delta:g}: no number of rows would certify it", None
    if needed is None or needed <= len(losses):
        return f"{said}: too close to delta, {delta:g}, to be told from it", None
    return f"{said}; about {needed} rows like these would certify it, {len(losses)} are given", (
        needed
    )
