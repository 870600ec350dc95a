"""Memory runs out in the middle of a run: the engine goes on with less, and no row changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eevp_batch.engine import residents
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.shortage import is_out_of_memory
from eevp_batch.errors import EngineError
from eevp_batch.records import Generation, Prompt, RowFailure
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import make_engine, run

EXITS = {"layers": [2, 4], "threshold": 0.3, "max_batch": 12}


def refused_by_the_allocator() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def refused_by_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def refused_by_python() -> None:
    raise MemoryError


def hold(engine: Engine, num_rows: int, refuse: Callable[[], None], late: bool = True) -> list[int]:
    """Let runs of more than `num_rows` find no memory; returns the rows of those that did not.

    Late: keys, values and states are written before, as where the scores no longer fit.
    """
    refused: list[int] = []
    layers = engine.model.layers
    whole = layers.run

    def scarce(indices: range, hidden: Any, tokens: PackedTokens, pool: Any) -> Any:
        is_refused = tokens.num_tokens > num_rows
        if is_refused:
            refused.append(tokens.num_tokens)
        if is_refused and not late:
            refuse()
        states = whole(indices, hidden, tokens, pool)
        if is_refused:
            refuse()
        return states

    layers.run = scarce  # type: ignore[method-assign]
    return refused


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
@pytest.mark.parametrize("late", [True, False])
def test_rows_come_out_the_same_when_memory_runs_out(
    tiny_llama: Path,
    prompts: list[Prompt],
    kv: str,
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residents, "GROW_AFTER", 1 << 30)
    expected = run(make_engine(tiny_llama, kv=kv, **EXITS), prompts)
    engine = make_engine(tiny_llama, kv=kv, **EXITS)
    refused = hold(engine, 64, refused_by_the_allocator, late)
    found = run(engine, prompts)
    assert refused and engine.stats.shortages == len(refused), "memory ran out, and it was counted"
    assert engine.stats.restarts > 0, "rows of the run that found none began again"
    assert engine.max_resident < 36, "fewer rows are held from then on"
    for key, generation in expected.items():
        assert found[key].exits == generation.exits, f"row {key} is not what it was"
        assert found[key].text == generation.text
    assert engine.stats.tokens == sum(g.generated_tokens for g in found.values()), (
        "tokens that were taken back are not counted twice"
    )
    before = len(refused)
    assert run(engine, prompts).keys() == expected.keys(), "the same engine serves again"
    assert len(refused) - before <= before, "what it has learned about memory it keeps"


def test_a_batch_that_was_halved_grows_back(
    tiny_llama: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While memory stays short, that is tried ever less often; rows never change."""
    monkeypatch.setattr(residents, "GROW_AFTER", 8)
    expected = run(make_engine(tiny_llama, **EXITS), prompts)
    engine = make_engine(tiny_llama, **EXITS)
    whole = (engine.queues.max_batch, engine.queues.max_tokens, engine.max_resident)
    steps: list[int] = []
    run_segment = engine.model.layers.run
    refused = hold(engine, 40, refused_by_the_allocator)
    scarce = engine.model.layers.run

    def counted(indices: range, hidden: Any, tokens: PackedTokens, pool: Any) -> Any:
        if tokens.num_tokens > 40:
            steps.append(engine.stats.steps.total())
        return scarce(indices, hidden, tokens, pool)

    engine.model.layers.run = counted  # type: ignore[method-assign]
    for _ in range(4):
        found = run(engine, prompts)
        assert {key: g.exits for key, g in found.items()} == {
            key: g.exits for key, g in expected.items()
        }
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps) if later > earlier + 2]
    assert len(gaps) >= 3 and gaps[-1] >= 4 * gaps[0], f"it goes on trying as before: {gaps}"
    engine.model.layers.run = run_segment  # type: ignore[method-assign]
    while (engine.queues.max_batch, engine.queues.max_tokens, engine.max_resident) != whole:
        run(engine, prompts)
        assert engine.stats.shortages == len(refused) and len(steps) < 100_000
    assert engine.queues.full_batch == make_engine(tiny_llama, **EXITS).queues.full_batch


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_prompts_that_are_given_up_leave_nothing_behind(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    """Whether they wait, are half done or were just admitted; those beside them come out."""
    kept = {
        g.row_id: g.exits for g in run(make_engine(tiny_llama, kv=kv, **EXITS), prompts).values()
    }
    for num_steps in (0, 1, 7, 30):
        engine = make_engine(tiny_llama, kv=kv, **EXITS)
        for number, prompt in enumerate(prompts):
            engine.add(replace(prompt, tag=number % 2))
        found = [result for _ in range(num_steps) for result in engine.step()]
        num_open = [number % 2 for number in range(len(prompts))].count(1)
        num_open -= sum(result.tag == 1 for result in found)
        assert engine.give_up(1) == num_open and engine.give_up(1) == 0
        before = len(found)
        while not engine.is_idle:
            found += engine.step()
        assert all(result.tag == 0 for result in found[before:])
        assert {r.row_id for r in found if r.tag == 0} == {p.row_id for p in prompts[::2]}
        assert all(isinstance(r, Generation) and r.exits == kept[r.row_id] for r in found)
        assert engine.pool.is_empty, "they still hold pages"
        assert engine.stats.tokens == sum(len(r.exits) for r in found if isinstance(r, Generation))


@pytest.mark.parametrize("refuse", [refused_by_the_device, refused_by_python])
def test_every_kind_of_shortage_is_one(
    tiny_llama: Path, prompts: list[Prompt], refuse: Callable[[], None]
) -> None:
    engine = make_engine(tiny_llama, **EXITS)
    refused = hold(engine, 64, refuse)
    run(engine, prompts)
    assert refused


def test_a_row_that_does_not_fit_alone_is_an_error_row(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    """The rows beside it come out, and the engine ends with nothing held."""
    small = [prompt for prompt in prompts if len(prompt.token_ids) < 30]
    expected = run(make_engine(tiny_llama, **EXITS), small)
    giants = [Prompt("giant", [5] * 150), Prompt("other giant", [6] * 160)]
    engine = make_engine(tiny_llama, **EXITS)
    hold(engine, 80, refused_by_the_allocator)
    results = list(engine.generate([*small[:9], *giants, *small[9:]]))
    failures = {r.row_id: r.error_class for r in results if isinstance(r, RowFailure)}
    assert failures == dict.fromkeys(("giant", "other giant"), "RowTooLargeError")
    found = {r.row_id: r.exits for r in results if isinstance(r, Generation)}
    assert found == {row: g.exits for (row, _), g in expected.items()}
    assert engine.pool.is_empty and engine.is_idle


def test_a_prefix_that_does_not_fit_is_not_shared(tiny_llama: Path) -> None:
    """Prompts come in a few at a time; what they share would run all at once."""
    prompts = [Prompt(row, [*range(5, 105), 200 + row]) for row in range(8)]
    sampling = SamplingSpec(max_new_tokens=6)
    expected = run(make_engine(tiny_llama, sampling=sampling, **EXITS), prompts)
    engine = make_engine(tiny_llama, sampling=sampling, **EXITS)
    fill = engine.model.run_segment

    def scarce(depth: int, tokens: PackedTokens, pool: Any) -> Any:
        if len(tokens.scored) == 1 and tokens.num_tokens == 100:
            refused_by_the_allocator()
        return fill(depth, tokens, pool)

    engine.model.run_segment = scarce  # type: ignore[method-assign]
    found = run(engine, prompts)
    assert engine.stats.shortages == 1 and engine.stats.shared_tokens == 0
    assert {key: g.exits for key, g in found.items()} == {k: g.exits for k, g in expected.items()}


def test_other_errors_are_not_taken_for_a_shortage(tiny_llama: Path, prompts: list[Prompt]) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = make_engine(tiny_llama, **EXITS)
    hold(engine, 64, broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(engine, prompts)
    assert not is_out_of_memory(EngineError("not enough memory"))
