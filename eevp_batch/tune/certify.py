"""Which of many settings may be used: Learn-then-Test by fixed-sequence testing along a path.

A *setting* is one threshold per exit layer. Settings are ordered into a *path* from conservative to
bold, and tested in that order until one fails; the last that passed is certified: P(its risk >
delta) <= epsilon (Angelopoulos et al., arXiv 2110.01052, section on fixed-sequence testing).

Why that holds, and what it asks for. Along the path there is a first setting whose true risk is
above delta. A setting with too high a risk can only be certified if that one was tested and passed,
and a valid p-value lets it pass with probability at most epsilon. This needs no relation between
the settings, and no correction for their number, but it needs a path that is fixed before the
calibration rows are looked at: ordered by their figures, "the first bad setting" would be chosen by
the same noise that has to refute it. So there are two splits of rows: `order_path` reads the tuning
split (rows of the fit may serve), `certify` the calibration split, each row of which is used once.
An unlucky order costs speed, never validity.

With several exit layers the settings have no natural order; the path is then the Pareto front of
what the tuning split says of risk and cost: every step buys speed with predicted risk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind
from eevp_batch.tune.bounds import Losses, p_value


def order_path(risks: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the Pareto front, from conservative to bold.

    Predicted risk rises and cost falls strictly along the path; of settings with equal risk the
    cheapest stays, of equal settings the first.

    Args:
        risks: [S], mean losses of the settings on the tuning split.
        costs: [S], predicted seconds, mean layers or anything of which less is better.

    Raises:
        CalibrationError: there are not as many costs as risks, or one is not a number.
    """
    if len(risks) != len(costs):
        raise CalibrationError(f"found {len(risks)} risks and {len(costs)} costs")
    if any(value != value for value in (*risks, *costs)):
        raise CalibrationError("a predicted risk or cost is not a number")
    path: list[int] = []
    for index in sorted(range(len(risks)), key=lambda i: (risks[i], costs[i])):
        if not path or costs[index] < costs[path[-1]]:
            path.append(index)
    return path


def fixed_sequence(p_values: Iterable[float], epsilon: float) -> int | None:
    """Index of the last setting before the first that fails; None if the first one fails.

    Reads no further than the first failure, so that p-values may be computed as they are asked for.
    """
    certified: int | None = None
    for index, value in enumerate(p_values):
        if not value <= epsilon:
            break
        certified = index
    return certified


def certify(
    losses_by_setting: Iterable[Losses],
    delta: float,
    epsilon: float,
    *,
    kind: PValueKind = "betting",
    seed: int = 0,
) -> int | None:
    """Index of the boldest setting whose risk is certified to be at most delta; None if none is.

    Args:
        losses_by_setting: for each setting, in the order of the path, the losses [n] of the
            calibration rows.
        delta: bound on the risk.
        epsilon: probability with which the certified setting may have a higher risk.
        kind: the p-value.
        seed: see `bounds.betting`.

    Raises:
        CalibrationError: a loss, delta or epsilon is out of range.
    """
    values = (p_value(kind, rows, delta, epsilon=epsilon, seed=seed) for rows in losses_by_setting)
    return fixed_sequence(values, epsilon)
