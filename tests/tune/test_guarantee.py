"""The guarantee, on simulated calibrations whose true risk is known: P(risk > delta) <= epsilon."""

from __future__ import annotations

import numpy as np
import pytest

from eevp_batch.spec import PValueKind
from eevp_batch.tune.bounds import Floats
from eevp_batch.tune.certify import certify, order_path
from tests.bench.guarantee import PATHS, WORLDS, Outcome, Setup, simulate

SETUP = Setup(delta=0.05, epsilon=0.1, num_rows=400, repetitions=200, seed=2)
KINDS: tuple[PValueKind, ...] = ("hoeffding_bentkus", "betting")


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], Outcome]:
    """By world, path and way of certifying, of 200 calibrations each."""
    return {
        (world, path, name): outcome
        for world, draw in WORLDS.items()
        for path, risks in PATHS.items()
        for name, outcome in simulate(
            draw, risks, SETUP, [*KINDS, "mean, no test", "normal"]
        ).items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("world", WORLDS)
def test_at_most_epsilon_of_the_calibrations_violate_delta(
    outcomes: dict[tuple[str, str, str], Outcome], world: str, path: str, kind: str
) -> None:
    outcome = outcomes[world, path, kind]
    print(f"{world}, {path}, {kind}: {outcome}")
    assert outcome.share <= SETUP.epsilon, f"{outcome} of {outcome.repetitions} violate delta"


@pytest.mark.parametrize("kind", KINDS)
def test_over_all_worlds_the_interval_too_is_below_epsilon(
    outcomes: dict[tuple[str, str, str], Outcome], kind: str
) -> None:
    mine = [outcome for (_, _, name), outcome in outcomes.items() if name == kind]
    total = Outcome(
        sum(outcome.violations for outcome in mine), sum(o.repetitions for o in mine), mean_risk=0
    )
    print(f"{kind}: {total}")
    assert total.interval[1] <= SETUP.epsilon


def test_what_is_certified_is_not_full_depth_alone(
    outcomes: dict[tuple[str, str, str], Outcome],
) -> None:
    for world in WORLDS:
        assert outcomes[world, "gradual", "betting"].mean_risk > 0.2, world


@pytest.mark.parametrize(
    ("world", "path", "name"),
    [("zero or one", "cliff", "mean, no test"), ("rare bad rows", "cliff", "normal")],
)
def test_these_worlds_find_out_who_has_no_guarantee(
    outcomes: dict[tuple[str, str, str], Outcome], world: str, path: str, name: str
) -> None:
    assert outcomes[world, path, name].interval[0] > SETUP.epsilon


def many_settings(rng: np.random.Generator, num_rows: int) -> Floats:
    """[S, n] losses of 60 settings: 20 of risk delta / 2, then 40 just above delta."""
    risks = np.repeat([0.5 * SETUP.delta, 1.05 * SETUP.delta], [20, 40])[:, None]
    return (rng.random((60, num_rows)) < risks).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_from_a_split_of_its_own_keeps_the_guarantee(kind: PValueKind) -> None:
    rng, costs, violations = np.random.default_rng(7), np.linspace(30, 10, 60), 0
    for _ in range(200):
        path = order_path(many_settings(rng, 200).mean(1).tolist(), costs.tolist())
        losses = many_settings(rng, SETUP.num_rows)[path]
        index = certify(losses, SETUP.delta, SETUP.epsilon, kind=kind)
        violations += index is not None and path[index] >= 20
    assert violations <= SETUP.epsilon * 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_from_the_calibration_rows_themselves_would_not(kind: PValueKind) -> None:
    rng, violations = np.random.default_rng(7), 0
    for _ in range(200):
        losses = many_settings(rng, SETUP.num_rows)[20:]
        luckiest = losses[[int(losses.mean(1).argmin())]]
        violations += certify(luckiest, SETUP.delta, SETUP.epsilon, kind=kind) is not None
    assert violations > 2 * SETUP.epsilon * 200, "the docstring of certify warns of nothing"
