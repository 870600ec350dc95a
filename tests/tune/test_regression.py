"""Sums are enough: known maps come out, halves add up, errors are those of the rows themselves."""

from __future__ import annotations

import pytest
import torch

from eevp_batch.tune.bridges import fit_bridge, reduce_rank
from eevp_batch.tune.regression import (
    FLOAT32_ROWS,
    PENALTIES,
    PROBED_OUTPUTS,
    NormalEquations,
    Ridge,
    RowSums,
    choose_penalty,
    fit_ridge,
    squared_error,
    unexplained,
)

WIDTH, OUT, TARGETS = 12, 5, (3, 4, 7)


def some_rows(count: int, seed: int, noise: float = 0.0) -> tuple[torch.Tensor, dict]:
    """Inputs with unequal variances and a mean, and targets that are affine in them."""
    maps = torch.Generator().manual_seed(99)
    scales = torch.logspace(-2, 1, WIDTH)
    weights = {target: torch.randn(OUT, WIDTH, generator=maps) for target in TARGETS}
    biases = {target: torch.randn(OUT, generator=maps) for target in TARGETS}
    rows = torch.Generator().manual_seed(seed)
    inputs = (torch.randn(count, WIDTH, generator=rows) + 1) * scales
    values = {
        target: inputs @ weights[target].T
        + biases[target]
        + noise * torch.randn(count, OUT, generator=rows)
        for target in TARGETS
    }
    return inputs, values


def summed(inputs: torch.Tensor, values: dict) -> NormalEquations:
    found = RowSums(inputs.shape[1])
    for some in torch.split(torch.arange(len(inputs)), 1000):
        block = found.block(inputs[some])
        found.add_inputs(block)
        for target, value in values.items():
            found.add_target(target, block, value[some])
    return found.total()


def with_constant(inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], 1)


@pytest.fixture
def noisy() -> tuple[NormalEquations, NormalEquations]:
    return summed(*some_rows(60, 1, noise=2.0)), summed(*some_rows(400, 2, noise=2.0))


def test_a_known_affine_map_comes_out() -> None:
    fit = fit_bridge(summed(*some_rows(300, 1)), summed(*some_rows(100, 2)))
    inputs, values = some_rows(50, 3)
    assert tuple(fit.bridge.layers) == TARGETS
    for layer, value in values.items():
        torch.testing.assert_close(fit.bridge.layers[layer](inputs), value, atol=1e-3, rtol=1e-4)
        assert fit.unexplained[layer] < 1e-6
    assert fit.num_tokens == (300, 100)


def test_sums_are_those_of_the_rows_and_halves_add_up() -> None:
    inputs, values = some_rows(101, 1, noise=1.0)
    columns = with_constant(inputs)
    halves = summed(inputs[:40], {t: v[:40] for t, v in values.items()}) + summed(
        inputs[40:], {t: v[40:] for t, v in values.items()}
    )
    none = summed(inputs[:0], {t: v[:0] for t, v in values.items()})
    for sums in (summed(inputs, values), halves, halves + none):
        assert sums.count == 101
        torch.testing.assert_close(sums.xx, columns.T @ columns, rtol=1e-5, atol=1e-3)
        for target, value in values.items():
            expected = columns.T @ value.double()
            torch.testing.assert_close(sums.xy[target], expected, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(sums.yy[target], value.double().square().sum(0))


def test_a_mean_that_dwarfs_the_variance_costs_no_digits() -> None:
    # Some entries of a language model's state are as good as constant, and large.
    inputs, values = some_rows(2000, 1)
    exact = inputs.double() + 1000 * torch.arange(WIDTH)
    covariance = torch.cov(exact.T, correction=0)
    found = Ridge(summed(exact, values))
    again = (found.axes * found.spread(0.0)) @ found.axes.T
    torch.testing.assert_close(again, covariance, rtol=1e-4, atol=1e-4)


def test_rows_beyond_what_float32_counts_are_summed_too() -> None:
    count = 2 * FLOAT32_ROWS + 3000
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(1)) + 5
    values = inputs.sum(1, keepdim=True) + 100
    sums = summed(inputs, {3: values})
    assert sums.count == count
    columns = with_constant(inputs)
    torch.testing.assert_close(sums.xx, columns.T @ columns, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.xy[3], columns.T @ values.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.yy[3], values.double().square().sum(0), rtol=1e-6, atol=0)


def test_the_error_from_sums_is_the_error_of_the_rows() -> None:
    inputs, values = some_rows(80, 1, noise=1.0)
    sums = summed(inputs, values)
    weights = torch.randn(WIDTH + 1, OUT, dtype=torch.float64)
    left = values[3].double() - with_constant(inputs) @ weights
    expected = left.square().mean(0)
    torch.testing.assert_close(squared_error(sums, 3, weights), expected, rtol=1e-5, atol=0)


def test_ridge_solves_its_own_normal_equations(noisy) -> None:
    sums, _ = noisy
    inputs, values = some_rows(60, 1, noise=2.0)
    centred = (inputs - inputs.mean(0)).double()
    penalty = 0.01 * centred.square().mean(0).mean() * len(inputs)
    expected = torch.linalg.solve(
        centred.T @ centred + penalty * torch.eye(WIDTH, dtype=torch.float64),
        centred.T @ (values[4] - values[4].mean(0)).double(),
    )
    found = next(Ridge(sums).maps(sums.xy[4], [0.01]))
    torch.testing.assert_close(found[:-1], expected, atol=1e-6, rtol=1e-5)
    mean = (inputs.double().mean(0) @ found[:-1]) + found[-1]
    torch.testing.assert_close(mean, values[4].double().mean(0), atol=1e-5, rtol=1e-5)


def left_by_penalty(sums: NormalEquations, held_out: NormalEquations) -> dict[float, float]:
    ridge, left = Ridge(sums), {}
    for penalty in PENALTIES:
        maps = {target: next(ridge.maps(xy, [penalty])) for target, xy in sums.xy.items()}
        left[penalty] = sum(unexplained(held_out, target, maps[target]) for target in maps)
    return left


def test_held_out_rows_choose_the_regularisation(noisy) -> None:
    sums, held_out = noisy
    left = left_by_penalty(sums, held_out)
    penalty = choose_penalty(Ridge(sums), sums, held_out)
    assert left[penalty] == min(left.values())
    assert 1e-8 < penalty < 1, "noisy rows ask for some, informative ones not for all"
    maps = fit_ridge(sums, held_out)
    for target in TARGETS:
        expected = next(Ridge(sums).maps(sums.xy[target], [penalty]))
        torch.testing.assert_close(maps[target], expected)


def test_where_outputs_are_many_a_sample_of_them_chooses_the_regularisation() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(WIDTH, 3 * PROBED_OUTPUTS, generator=generator)

    def rows(count: int) -> NormalEquations:
        inputs = torch.randn(count, WIDTH, generator=generator)
        noise = 4 * torch.randn(count, weight.shape[1], generator=generator)
        return summed(inputs, {5: inputs @ weight + noise})

    sums, held_out = rows(30), rows(400)
    assert [len(squares) for squares in sums.probed().yy.values()] == [PROBED_OUTPUTS]
    left = left_by_penalty(sums, held_out)
    assert left[choose_penalty(Ridge(sums), sums, held_out)] == min(left.values())


def test_sums_of_mapped_inputs_need_no_second_look() -> None:
    inputs, values = some_rows(50, 1, noise=1.0)
    down = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mapped = with_constant(inputs.double() @ down.T)
    found = summed(inputs, values).through(down)
    torch.testing.assert_close(found.xx, mapped.T @ mapped, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.xy[3], mapped.T @ values[3].double(), rtol=1e-5, atol=1e-3)


def test_low_rank_at_full_rank_is_the_full_map(noisy) -> None:
    sums, held_out = noisy
    assert fit_bridge(sums, held_out, rank=WIDTH).bridge.down is None
    ridge = Ridge(sums)
    down, maps = reduce_rank(ridge, 0.01, sums, WIDTH)
    for target in TARGETS:
        whole = next(ridge.maps(sums.xy[target], [0.01]))
        torch.testing.assert_close(down.T @ maps[target][:-1], whole[:-1])
        torch.testing.assert_close(maps[target][-1], whole[-1])


def test_low_rank_is_enough_where_the_map_has_that_rank() -> None:
    def rows(seed: int) -> NormalEquations:
        inputs, _ = some_rows(200, seed)
        thin = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
        values = {
            t: inputs @ thin.T @ torch.randn(2, OUT, generator=torch.Generator().manual_seed(t)) + t
            for t in TARGETS
        }
        return summed(inputs, values)

    sums, held_out = rows(1), rows(2)
    enough = fit_bridge(sums, held_out, rank=2)
    assert enough.bridge.down is not None and enough.bridge.down.shape == (2, WIDTH)
    assert enough.bridge.layers[3].weight.shape == (OUT, 2)
    assert max(enough.unexplained.values()) < 1e-6
    assert max(fit_bridge(sums, held_out, rank=1).unexplained.values()) > 0.01


def test_more_rank_leaves_less(noisy) -> None:
    sums, _ = noisy
    left = [sum(fit_bridge(sums, sums, rank=rank).unexplained.values()) for rank in (1, 3, 6, 11)]
    assert left == sorted(left, reverse=True)
