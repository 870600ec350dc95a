"""Whether a deep token had been kept: counted as an outsider with the model alone would count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eevp_batch.engine.pruned_vocab import prune
from eevp_batch.records import Generation, Prompt
from eevp_batch.row_counts import NUM_SLOWEST, KeptTokens, SlowRow, slowest
from tests.engine.conftest import load_model, make_engine, run

K, PRUNE_LAYER, NUM_LAYERS = 8, 2, 6
END = torch.tensor([1])


def kept_by_hand(model: torch.nn.Module, prompt: Prompt, generation: Generation) -> int:
    """Generated tokens among the K likeliest after `PRUNE_LAYER`, in one pass over the text."""
    ids = torch.tensor([prompt.token_ids + generation.token_ids])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[PRUNE_LAYER][0]
        scores = model.lm_head(model.model.norm(hidden))
    first = len(prompt.token_ids) - 1
    kept = prune(scores[first : first + generation.generated_tokens], K, END)[0].ids
    return sum(token in row for token, row in zip(generation.token_ids, kept.tolist(), strict=True))


def test_recall_is_that_of_one_pass_over_the_text(tiny_llama: Path, prompts: list[Prompt]) -> None:
    model = load_model(tiny_llama)
    engine = make_engine(tiny_llama, layers=[PRUNE_LAYER, 4], threshold=2.0, top_k=K, model=model)
    found = run(engine, prompts)
    for prompt in prompts:
        generation = found[prompt.row_id, 0]
        expected = kept_by_hand(model, prompt, generation)
        assert generation.kept == KeptTokens(generation.generated_tokens, expected)
    total = engine.vitals.kept
    assert total == sum((g.kept for g in found.values()), start=KeptTokens())
    assert 0 < total.kept < total.tokens, "some tokens were kept, some were not"


@pytest.mark.parametrize("kv", ["propagate", "recompute"])
def test_each_deep_token_is_asked_for_once(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    engine = make_engine(tiny_llama, layers=[PRUNE_LAYER, 4], threshold=0.3, top_k=K, kv=kv)
    for generation in run(engine, prompts).values():
        assert generation.kept.tokens == generation.exit_layers.count(NUM_LAYERS)
        assert generation.seconds is not None and generation.seconds > 0
    vitals = engine.vitals
    assert (vitals.num_layers, vitals.num_kept_ids) == (NUM_LAYERS, K)
    assert vitals.pages > 0 and vitals.pages_in_use == 0, "after a run nothing is held"
    assert list(vitals.waiting) == [0, 0, 0] and vitals.arrivals == 0
    assert vitals.rows[0] >= vitals.rows[1] >= vitals.rows[2] > 0, "who goes deeper was there"


def test_drafts_that_fall_ask_for_nothing(tiny_llama: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(tiny_llama, layers=[PRUNE_LAYER], threshold=0.1, top_k=None, kv="verify")
    assert engine.vitals.num_kept_ids is None and engine.vitals.kept == KeptTokens()
    engine = make_engine(tiny_llama, layers=[PRUNE_LAYER], threshold=0.1, top_k=512, kv="verify")
    kept = [generation.kept for generation in run(engine, prompts).values()]
    assert sum(one.tokens for one in kept) > 0
    assert all(one.tokens == one.kept for one in kept), "where K = V everything is kept"


@pytest.mark.parametrize("vocab", [{"final_head": "pruned"}, {}])
def test_what_cannot_be_missed_is_not_counted(
    tiny_llama: Path, prompts: list[Prompt], vocab: dict[str, str]
) -> None:
    layers = [PRUNE_LAYER] if vocab else None
    engine = make_engine(tiny_llama, layers=layers, vocab=vocab)
    kept = {generation.kept for generation in run(engine, prompts[:4]).values()}
    assert kept == {KeptTokens()} and KeptTokens().recall is None


def test_the_slowest_rows_of_parts_are_those_of_the_whole() -> None:
    rows = [SlowRow(float(7 * row % 50), f"r{row}", 0, row) for row in range(50)]
    parts = [slowest(rows[start : start + 15]) for start in range(0, 50, 15)]
    whole = slowest(row for part in parts for row in part)
    assert whole == slowest(rows) and len(whole) == NUM_SLOWEST
    assert [row.seconds for row in whole] == [49.0 - place for place in range(NUM_SLOWEST)]
