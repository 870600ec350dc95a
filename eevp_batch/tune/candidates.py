"""Which thresholds are worth a replay: thousands predicted from one pass, a few taken.

The prediction takes every exit's confidence and choice as they are at full depth; that exits change
the keys and values of later tokens, only a replay shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eevp_batch.engine.exits import decayed
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune.certify import order_path
from eevp_batch.tune.replay import Replay, ReplaySettings
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row

NEVER = 2.0
"""A threshold that no confidence exceeds."""
MOST_PREDICTED = 4096
"""Combinations of thresholds that are predicted."""
MOST_QUANTILES = 64
"""Thresholds of one exit among them."""
_NEAR = 2.0
"""Half of the settings lie where the predicted risk is at most so many times delta."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Exit:
    """One exit as S tokens see it at full depth.

    Attributes:
        confidences: [S] float32.
        agrees: [S], whether it would choose the token that was generated; at the last one it may
            not where that scores the kept ids only.
    """

    confidences: npt.NDArray[np.float32]
    agrees: Bools

    def thresholds(self, count: int) -> list[float]:
        """From never to always: quantiles, so that each lets about as many more tokens leave."""
        inner = np.quantile(self.confidences, np.linspace(1, 0, count), method="higher")
        return list(dict.fromkeys([NEVER, *(max(0.0, float(value)) for value in inner), 0.0]))


def candidate_grid(
    model: SegmentedModel,
    settings: ReplaySettings,
    rows: Sequence[Row],
    costs: Costs,
    delta: float,
    count: int,
) -> list[tuple[float, ...]]:
    """Settings that spread over all costs, half of them where the risk is about delta.

    Args:
        model: cut at the exit layers.
        settings: of the job.
        rows: one or more.
        costs: of the model.
        delta: the risk that matters.
        count: about how many settings; 2 or more.
    """
    *exits, last = _exits_seen(model, settings, rows)
    each = min(MOST_QUANTILES, max(4, int(MOST_PREDICTED ** (1 / len(exits)))))
    choices = [exit.thresholds(each) for exit in exits]
    leaving = [
        _leaving(exit, some, settings, rows) for exit, some in zip(exits, choices, strict=True)
    ]
    weights = np.concatenate(
        [np.full(len(r.generated_ids), 1 / len(r.generated_ids) / len(rows)) for r in rows]
    )
    grid, risks, spent = [], [], []
    for numbers in itertools.product(*(range(len(some)) for some in choices)):
        thresholds = tuple(some[n] for some, n in zip(choices, numbers, strict=True))
        if set(thresholds) == {NEVER} and costs.final_k is None:
            continue
        staying, wrong, shares = np.ones(len(weights), dtype=bool), 0.0, []
        for exit, leaves, number in zip(exits, leaving, numbers, strict=True):
            out = staying & leaves[number]
            wrong += float(weights[out & ~exit.agrees].sum())
            shares.append(float(out.mean()))
            staying &= ~out
        wrong += float(weights[staying & ~last.agrees].sum())
        grid.append(thresholds)
        risks.append(wrong)
        spent.append(costs.with_exits(model.exit_layers[:-1], shares))
    taken = _taken(np.array(risks), np.array(spent), delta, count)
    return [grid[number] for number in taken]


def _exits_seen(
    model: SegmentedModel, settings: ReplaySettings, rows: Sequence[Row]
) -> list[_Exit]:
    """Every exit's confidence in every token, keys and values exact; the last layer's as well."""
    exact = settings.exits.model_copy(
        update={"kv": "recompute", "max_waiting": 1 << 62, "decay": None}
    )
    replay = Replay(model, replace(settings, exits=exact))
    early = len(model.exit_layers) - 1
    only = [[-2.0 if other == one else NEVER for other in range(early)] for one in range(early + 1)]
    seen = []
    for found in replay.run(rows, only):
        confidences = [value for one in found for value in one.confidences]
        agrees = [
            said == meant
            for one, row in zip(found, rows, strict=True)
            for said, meant in zip(one.token_ids, row.generated_ids, strict=True)
        ]
        seen.append(_Exit(np.array(confidences, dtype=np.float32), np.array(agrees, dtype=bool)))
    return seen


def _leaving(
    exit: _Exit, thresholds: Sequence[float], settings: ReplaySettings, rows: Sequence[Row]
) -> list[Bools]:
    """For each threshold, which of the tokens that reach the exit would leave."""
    decay, limit = settings.exits.decay, settings.sampling.max_new_tokens
    if decay is None:
        return [exit.confidences > np.float32(value) for value in thresholds]
    longest = max(len(row.generated_ids) for row in rows)
    found = []
    for value in thresholds:
        by_step = np.array([decayed(value, step, limit, decay) for step in range(longest)])
        bars = np.concatenate([by_step[: len(row.generated_ids)] for row in rows])
        found.append(exit.confidences > bars.astype(np.float32))
    return found


def _taken(risks: Floats, costs: Floats, delta: float, count: int) -> list[int]:
    """Numbers of the settings to replay, dearest first."""
    front = order_path(risks.tolist(), costs.tolist())
    near = [costs[n] for n in front if risks[n] <= _NEAR * delta] or [costs.max()]
    everywhere = _ladder(risks, costs, float(costs.min()), float(costs.max()), count - count // 2)
    around = _ladder(risks, costs, float(min(near)), float(max(near)), count // 2)
    return sorted({*everywhere, *around}, key=lambda n: (-costs[n], n))


def _ladder(risks: Floats, costs: Floats, low: float, high: float, count: int) -> list[int]:
    """For each of some costs, the setting of least risk among those that are no dearer.

    Of equal risk the dearest, for it has the fewest exits: a prediction of no risk at all is seldom
    right.
    """
    order = np.lexsort((-costs, risks))
    return [
        int(next(n for n in order if costs[n] <= target))
        for target in np.linspace(high, low, count)
    ]
