"""Every setting of a grid is replayed as if it were the only one, and no prompt runs again for it.

The texts are random, so that any settings can be replayed on them; what each must give comes from
the engine's own sequences, one token after another.
"""

from __future__ import annotations

import random
from typing import Any, Literal, NamedTuple

import pytest
import torch

from eevp_batch.engine.exits import ExitRule
from eevp_batch.engine.packing import pack
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ScoredTokens, ShortPrompt
from eevp_batch.engine.sequence import Sequence as Generating
from eevp_batch.records import Prompt, TokenExit
from eevp_batch.spec import SamplingSpec, VocabSpec
from eevp_batch.tune.replay import Replay, Replayed, ReplaySettings, Thresholds
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows
from tests.tune.test_replay import exit_spec, tiny_fitted

NEVER = 2.0
MIXED = [0.2, 0.4]
GRID: list[list[float]] = [[0.0, NEVER], [NEVER, 0.3], MIXED, [NEVER, NEVER], [0.5, 0.0]]
"""Thresholds after two exits: bold and cautious ones in turn."""
SHARED = [5 + number % 200 for number in range(50)]
"""Tokens that prompts may begin with."""
KINDS = [("llama", False), ("mistral", True)]
"""Families, and whether prompts begin alike; the second looks back over a few tokens only."""


class Case(NamedTuple):
    """How a job runs.

    Attributes:
        kv: the KV policy.
        tail, lead: of prompts that are bridged; None: they run in full.
        prune: number of the exit that cuts the vocabulary.
        final_head: what the last layer scores.
    """

    kv: str
    tail: int | None = None
    lead: int = 0
    prune: int = 0
    final_head: Literal["full", "pruned"] = "full"


EXACT = [Case("recompute"), Case("recompute", final_head="pruned"), Case("verify")]
APPROXIMATE = [
    Case("propagate"),
    Case("bridge"),
    Case("bridge", prune=1),
    Case("propagate", prune=1, final_head="pruned"),
    Case("bridge", final_head="pruned"),
    Case("bridge", tail=3),
    Case("bridge", tail=1, lead=6),
]


class Trial(NamedTuple):
    """A model and its job."""

    model: SegmentedModel
    settings: ReplaySettings

    @classmethod
    def of(cls, case: Case, path: Any, layers: list[int]) -> Trial:
        model = SegmentedModel(load_model(path), [*layers, NUM_LAYERS])
        if case.kv == "bridge":
            model.use(tiny_fitted(path, layers))
        prefill = "full" if case.tail is None else "bridge"
        vocab = VocabSpec(top_k=32, final_head=case.final_head)
        exits = exit_spec(
            layers, [0.0] * len(layers), kv=case.kv, prefill=prefill, max_waiting=3, vocab=vocab
        )
        settings = ReplaySettings(
            exits=exits,
            sampling=SamplingSpec(max_new_tokens=24),
            prune_layer=layers[case.prune],
            always_kept=[1],
            short_prompt=None
            if case.tail is None
            else ShortPrompt(layers[0], case.tail, case.lead),
        )
        return cls(model, settings)

    def replayed(
        self, rows: list[Row], grid: list[list[float]], pass_tokens: int = 120
    ) -> list[list[Replayed]]:
        return Replay(self.model, self.settings, pass_tokens).run(rows, grid)


def known_rows(is_shared: bool, count: int = 12) -> list[Row]:
    """Random texts after prompts of 1 to 40 tokens; of the first two nothing generated is fed."""
    rng = random.Random(11)

    def draw(length: int) -> list[int]:
        return [rng.randrange(3, 320) for _ in range(length)]

    prompts = [draw(length) for length in (1, 17, 16, *(rng.randrange(1, 41) for _ in range(9)))]
    lengths = [1, 1, *(rng.randrange(2, 13) for _ in prompts)]
    start = SHARED if is_shared else []
    rows = [Row([*start, *ids], draw(size)) for ids, size in zip(prompts, lengths, strict=False)]
    return rows[:count]


def one_by_one(trial: Trial, row: Row, thresholds: Thresholds) -> list[tuple[int, int]]:
    """Exit layer and id of each token as a sequence of the engine meets it, the text given."""
    model, settings = trial
    last = model.num_segments - 1
    rule = ExitRule(
        model,
        model.exit_layers,
        settings.prune_layer,
        settings.exits,
        settings.sampling,
        settings.always_kept,
        max_resident=1,
        max_batch=1,
    )
    pool = model.make_pool(num_pages=10, max_resident=1, max_pages=10)
    sequence = Generating(
        Prompt("", list(row.prompt_ids)),
        model.num_segments,
        len(row.generated_ids) + 1,
        0,
        settings.exits.kv,
        short_prompt=settings.short_prompt,
    )
    pool.admit(sequence, sequence.max_positions, [])
    found = []
    for token_id in row.generated_ids:
        pool.grow(sequence)
        for depth, bar in enumerate([*thresholds, -1.0]):
            tokens = pack([sequence], depth, pool, model.layers.padding)
            with torch.inference_mode():
                states = model.run_segment(depth, tokens, pool)
                decision = rule.decide(depth, states, ScoredTokens.of([sequence], tokens.scored))
            if depth == last or decision.confidences[0] > bar:
                break
            sequence.mark_filled(depth)
        layer = model.exit_layers[depth]
        found.append((layer, decision.token_ids[0]))
        sequence.leave(depth, [TokenExit(token_id, layer, decision.confidences[0])])
    return found


@pytest.mark.parametrize("case", APPROXIMATE, ids=str)
@pytest.mark.parametrize(("family", "is_shared"), KINDS)
def test_each_setting_of_a_grid_is_what_one_token_after_another_gives(
    family: str, is_shared: bool, case: Case, tiny_model_path: Any
) -> None:
    trial, rows = Trial.of(case, tiny_model_path(family), [2, 4]), known_rows(is_shared, 6)
    layers: list[set[int]] = []
    for thresholds, found in zip(GRID, trial.replayed(rows, GRID), strict=True):
        for row, one in zip(rows, found, strict=True):
            said = list(zip(one.exit_layers, one.token_ids, strict=True))
            assert said == one_by_one(trial, row, thresholds), f"under {thresholds}"
        layers.append({layer for one in found for layer in one.exit_layers})
    assert set.union(*layers) == {2, 4, NUM_LAYERS}, "tokens leave everywhere, or nothing is shown"
    assert len(layers[GRID.index(MIXED)]) > 1, "under one setting some leave and some stay"


@pytest.mark.parametrize("case", [*APPROXIMATE, *EXACT], ids=str)
@pytest.mark.parametrize(("family", "is_shared"), KINDS)
def test_a_setting_gives_the_same_alone_and_after_any_others(
    family: str, is_shared: bool, case: Case, tiny_model_path: Any
) -> None:
    path = tiny_model_path(family)
    trial, rows = Trial.of(case, path, [2, 4]), known_rows(is_shared)
    if case.kv == "verify":  # of a random text no draft would stand
        rows = make_rows(path, trial.model, 12)
    alone = [trial.replayed(rows, [thresholds])[0] for thresholds in GRID]
    assert len({str(found) for found in alone}) == len(GRID), "or nothing is shown"
    rng = random.Random(3)
    for _ in range(2):
        order = rng.choices(range(len(GRID)), k=8)
        found = trial.replayed(rows, [GRID[number] for number in order])
        assert found == [alone[number] for number in order], f"in the order {order}"


@pytest.mark.parametrize("case", [*APPROXIMATE, *EXACT], ids=str)
@pytest.mark.parametrize("layers", [[3], [2, 4]])
def test_no_prompt_token_runs_again_for_another_setting(
    layers: list[int], case: Case, tiny_model_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, rows = (
        Trial.of(case._replace(prune=0), tiny_model_path("llama"), layers),
        known_rows(False),
    )
    run_segment, work = trial.model.run_segment, [[0, 0] for _ in range(len(layers) + 1)]

    def counted(depth: int, tokens: Any, pool: Any) -> Any:
        work[depth][0] += tokens.num_tokens
        work[depth][1] += len(tokens.project_slots)
        return run_segment(depth, tokens, pool)

    def work_of(num_settings: int) -> list[list[int]]:
        """By depth, tokens that run and tokens that are projected."""
        work[:] = [[0, 0] for _ in work]
        trial.replayed(rows, [[NEVER] * len(layers)] * num_settings)
        return list(work)

    monkeypatch.setattr(trial.model, "run_segment", counted)
    fed = sum(len(row.generated_ids) - 1 for row in rows)
    prompts = sum(len(row.prompt_ids) for row in rows)
    one, four = work_of(1), work_of(4)
    assert one[0] == four[0] == [prompts + fed, 0], "the first segment runs once for all"
    again = 0 if case in EXACT else 3 * fed
    for (ran, projected), (ran_by_four, projected_by_four) in zip(one[1:], four[1:], strict=True):
        assert ran_by_four == ran + again and projected_by_four == projected
        assert ran == prompts + fed if case.tail is None else ran < prompts + fed
        assert (projected > 0) == (case.tail is not None)
