"""Beginnings that prompts share are computed once, and no row can tell."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine
from eevp_batch.engine.prefixes import MAX_PREFIXES, WORTHWHILE_TOKENS
from eevp_batch.records import Prompt, RowFailure
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec
from tests.engine.conftest import greedy, load_model, make_engine, run


def with_header(header: int, rows: int = 12, seed: int = 3) -> list[Prompt]:
    """Prompts of a common header and 1 to 9 tokens of their own."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 319) for _ in range(header)]
    return [
        Prompt(row, common + [rng.randrange(3, 319) for _ in range(rng.randrange(1, 10))])
        for row in range(rows)
    ]


@pytest.mark.parametrize("header", [15, 16, 50])
def test_sharing_changes_no_row(any_tiny_model: Path, header: int) -> None:
    prompts = with_header(header)
    settings = {"layers": [2, 4], "threshold": 0.3}
    engine = make_engine(any_tiny_model, **settings)
    shared = run(engine, prompts)
    saved = engine.stats.shared_tokens
    assert saved >= header * (len(prompts) - 1), "every row but the first is spared the header"
    limits = {"max_resident": 15, "prefix_sharing": False}
    apart = make_engine(any_tiny_model, limits=limits, **settings)
    plain = run(apart, prompts)
    assert apart.stats.shared_tokens == 0
    for key, generation in plain.items():
        assert shared[key].token_ids == generation.token_ids
        assert shared[key].exit_layers == generation.exit_layers


def test_shared_rows_equal_transformers(any_tiny_model: Path) -> None:
    prompts = with_header(40)
    found = run(make_engine(any_tiny_model), prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)


def test_the_samples_of_a_row_share_its_whole_prompt(tiny_llama: Path) -> None:
    sampling = SamplingSpec(temperature=1.0, max_new_tokens=4, n=6)
    rng = random.Random(5)
    rows = [[rng.randrange(3, 319) for _ in range(60)] for _ in range(2)]
    prompts = [Prompt(row, ids, sample) for row, ids in enumerate(rows) for sample in range(6)]
    engine = make_engine(tiny_llama, sampling=sampling, limits={"max_resident": 12})
    run(engine, prompts)
    assert engine.stats.shared_tokens == 2 * 6 * 59, "all but the front token, in both rows"


def test_bfloat16_bits_do_not_depend_on_sharing(tiny_llama: Path) -> None:
    prompts = with_header(37)

    def confidences(shares: bool) -> dict[object, list[float]]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
        engine: Engine = build_engine(
            model,
            AutoTokenizer.from_pretrained(tiny_llama),
            ExitSpec(layers=[2, 4], threshold=0.3),
            SamplingSpec(max_new_tokens=12),
            EngineSpec(max_batch=5, prefix_sharing=shares),
        )
        assert not shares or engine._limits.shares_prefixes
        return {key: g.exit_confidences for key, g in run(engine, prompts).items()}

    assert confidences(True) == confidences(False)


def test_little_in_common_is_not_worth_a_prefix(tiny_llama: Path) -> None:
    few = with_header(8, rows=WORTHWHILE_TOKENS // 8)
    engine = make_engine(tiny_llama)
    run(engine, few)
    assert engine.stats.shared_tokens == 0, "8 tokens for 7 others save less than 64"


def test_prefixes_make_room_for_rows(tiny_llama: Path) -> None:
    """A kept prefix must not keep a row out that fits an empty pool."""
    engine = make_engine(tiny_llama, limits={"max_resident": 4, "kv_memory": 130_000})
    for prompt in with_header(48, rows=4):
        engine.add(prompt)
    results = []
    while not engine.is_idle:
        results += engine.step()
    assert len(engine.prefixes) == 1, "stepping leaves the prefix for later rows"
    longest = engine.pool.max_positions - 20
    engine.add(Prompt("long", [7] * longest))
    while not engine.is_idle:
        results += engine.step()
    assert not [result for result in results if isinstance(result, RowFailure)]
    assert len(engine.prefixes) == 0, "it gave way"


def test_the_prefix_used_longest_ago_gives_way_to_another(tiny_llama: Path) -> None:
    groups = [with_header(40, rows=3, seed=seed) for seed in range(MAX_PREFIXES + 2)]
    groups.insert(MAX_PREFIXES, groups[0])  # once more, so that the second one is the oldest
    ids = [prompt.token_ids for group in groups for prompt in group]
    prompts = [Prompt(row, token_ids) for row, token_ids in enumerate(ids)]
    engine = make_engine(tiny_llama, limits={"max_resident": 3})
    for prompt in prompts:
        engine.add(prompt)
    results = []
    while not engine.is_idle:
        results += engine.step()
    assert engine.stats.shared_tokens >= 40 * len(prompts), "no group was without its prefix"
    plain = run(make_engine(tiny_llama, limits={"prefix_sharing": False}), prompts)
    found = {result.row_id: result.token_ids for result in results}
    assert found == {row: generation.token_ids for (row, _), generation in plain.items()}


def test_a_nan_in_a_shared_header_stays_in_its_rows(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[319] = torch.nan
    engine = make_engine(tiny_llama, model=model, limits={"max_resident": 5})
    good = with_header(40, seed=4)
    expected = run(engine, good)
    bad = [Prompt(f"bad-{p.row_id}", [319, *p.token_ids]) for p in good]
    failed = list(engine.generate(bad))
    assert all(isinstance(result, RowFailure) for result in failed) and len(failed) == len(bad)
    assert engine.pool.is_empty
    again = run(engine, good)
    assert all(again[key].token_ids == expected[key].token_ids for key in expected)
