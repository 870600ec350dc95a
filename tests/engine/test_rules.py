"""The rules that hold always, on tiny random models of every family in float32.

The oracle is plain transformers greedy generation of the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import DecaySpec, SamplingSpec
from tests.engine.conftest import greedy, load_model, make_engine, needs_vnni, oracle, run
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE


def same(left: Generation, right: Generation) -> bool:
    """Whether two generations agree in tokens, exit layers and (to rounding) confidences."""
    if (left.token_ids, left.exit_layers) != (right.token_ids, right.exit_layers):
        return False
    pair = torch.tensor([left.exit_confidences, right.exit_confidences])
    return torch.allclose(pair[0], pair[1], atol=1e-4)


def test_exits_off_equals_greedy(any_tiny_model: Path, prompts: list[Prompt]) -> None:
    found = run(make_engine(any_tiny_model), prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)
        assert set(found[prompt.row_id, 0].exit_layers) == {NUM_LAYERS}


@pytest.mark.parametrize("layers", [[3], [2, 4], [1, 2, 3, 5]])
def test_threshold_above_one_equals_greedy(
    any_tiny_model: Path, prompts: list[Prompt], layers: list[int]
) -> None:
    engine = make_engine(any_tiny_model, layers=layers, threshold=1.5)
    found = run(engine, prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)
    assert len(engine.stats.steps) == len(layers) + 1, "every segment ran"


@pytest.mark.parametrize("kind", ["margin", "max_prob", "entropy", "hidden_cosine"])
def test_a_row_alone_equals_the_row_in_a_mixed_batch(
    any_tiny_model: Path, prompts: list[Prompt], kind: str
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.35, "confidence": kind}
    mixed = run(make_engine(any_tiny_model, max_batch=7, **settings), prompts)
    alone = make_engine(any_tiny_model, max_batch=1, limits={"max_resident": 1}, **settings)
    for prompt in prompts[:12]:
        replay = run(alone, [prompt])[prompt.row_id, 0]
        assert same(replay, mixed[prompt.row_id, 0]), f"row {prompt.row_id} depends on its batch"
    seen = {layer for generation in mixed.values() for layer in generation.exit_layers}
    assert len(seen) > 1, "the threshold lets some tokens leave early and holds others"


def test_order_and_memory_change_nothing(tiny_llama: Path, prompts: list[Prompt]) -> None:
    settings = {"layers": [2, 4], "threshold": 0.35}
    first = run(make_engine(tiny_llama, **settings), prompts)
    tight = {"max_resident": 3, "kv_memory": 130_000}
    engine = make_engine(tiny_llama, limits=tight, **settings)
    assert engine.pool.num_pages < 3 * 4, "memory, not seats, is what is short here"
    again = run(engine, prompts[::-1])
    assert all(same(first[key], again[key]) for key in first)


def test_the_same_engine_twice_gives_the_same(tiny_llama: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(tiny_llama, layers=[2, 4])
    first, second = run(engine, prompts), run(engine, prompts)
    assert all(same(first[key], second[key]) for key in first)


@pytest.mark.parametrize("final_head", ["full", "pruned"])
def test_keeping_the_whole_vocabulary_equals_no_pruning(
    any_tiny_model: Path, prompts: list[Prompt], final_head: str
) -> None:
    settings = {"layers": [1, 3, 5], "threshold": 0.4, "vocab": {"final_head": final_head}}
    pruned = run(make_engine(any_tiny_model, top_k=VOCAB_SIZE, **settings), prompts)
    whole = run(make_engine(any_tiny_model, top_k=None, **settings), prompts)
    assert all(same(pruned[key], whole[key]) for key in whole)


@pytest.mark.parametrize("proposal", [pytest.param("int8", marks=needs_vnni), "low_rank"])
def test_keeping_the_whole_vocabulary_of_a_proposal_equals_no_pruning(
    tiny_llama: Path, prompts: list[Prompt], proposal: str
) -> None:
    settings = {"layers": [1, 3, 5], "threshold": 0.4}
    vocab = {"proposal": proposal, "final_head": "pruned"}
    pruned = run(make_engine(tiny_llama, top_k=VOCAB_SIZE, vocab=vocab, **settings), prompts)
    whole = run(make_engine(tiny_llama, top_k=None, **settings), prompts)
    assert all(same(pruned[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    "vocab",
    [pytest.param({"proposal": "int8"}, marks=needs_vnni), {"proposal": "low_rank", "rank": 8}],
)
def test_a_row_of_a_proposal_alone_equals_the_row_in_a_mixed_batch(
    tiny_llama: Path, prompts: list[Prompt], vocab: dict[str, Any]
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.35, "top_k": 12}  # few enough to be gathered
    settings |= {"vocab": {"final_head": "pruned", **vocab}}
    mixed = run(make_engine(tiny_llama, max_batch=7, **settings), prompts)
    alone = make_engine(tiny_llama, max_batch=1, limits={"max_resident": 1}, **settings)
    for prompt in prompts:
        replay = run(alone, [prompt])[prompt.row_id, 0]
        assert same(replay, mixed[prompt.row_id, 0]), f"row {prompt.row_id} depends on its batch"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_leaving_everywhere_equals_the_model_cut_there(
    any_tiny_model: Path, prompts: list[Prompt], depth: int
) -> None:
    layers = [1, 3, 4]
    threshold = [0.0 if exit == depth else 1.5 for exit in range(3)]
    engine = make_engine(any_tiny_model, layers=layers, threshold=threshold, top_k=VOCAB_SIZE)
    found = run(engine, prompts)
    cut = load_model(any_tiny_model)
    cut.model.layers = cut.model.layers[: layers[depth]]
    cut.config.num_hidden_layers = layers[depth]
    for prompt in prompts:
        generation = found[prompt.row_id, 0]
        assert generation.token_ids == oracle(cut, prompt)
        assert set(generation.exit_layers) == {layers[depth]}
    assert engine.stats.steps[depth + 1] == 0, "nobody went deeper, not even the prompts"


def test_pruning_at_a_later_exit(tiny_llama: Path, prompts: list[Prompt]) -> None:
    vocab = {"prune_layer": 3, "final_head": "pruned"}
    settings = {"layers": [1, 3, 5], "threshold": 0.4}
    pruned = run(make_engine(tiny_llama, top_k=VOCAB_SIZE, vocab=vocab, **settings), prompts)
    whole = run(make_engine(tiny_llama, top_k=None, **settings), prompts)
    assert all(same(pruned[key], whole[key]) for key in whole)


def test_a_lower_threshold_never_leaves_later_at_the_first_token(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    runs = [
        run(make_engine(tiny_llama, layers=[2, 4], threshold=bar), prompts) for bar in (0.1, 0.5)
    ]
    for key, bold in runs[0].items():
        assert bold.exit_layers[0] <= runs[1][key].exit_layers[0]


def test_decay_lets_later_tokens_leave(tiny_llama: Path, prompts: list[Prompt]) -> None:
    settings = {"layers": [2, 4], "threshold": 0.9}
    plain = run(make_engine(tiny_llama, **settings), prompts)
    decay = DecaySpec(temperature=4.0)
    decayed = run(make_engine(tiny_llama, decay=decay, **settings), prompts)
    mean = [sum(g.mean_exit_layer for g in runs.values()) / len(runs) for runs in (plain, decayed)]
    assert mean[1] < mean[0], "0.9 decays to 0.81, so more tokens leave"


def test_repetition_penalty_equals_transformers(
    any_tiny_model: Path, prompts: list[Prompt]
) -> None:
    sampling = SamplingSpec(max_new_tokens=20, repetition_penalty=1.4)
    found = run(make_engine(any_tiny_model, sampling=sampling), prompts)
    model = load_model(any_tiny_model)
    for prompt in prompts:
        expected = oracle(model, prompt, repetition_penalty=1.4)
        assert found[prompt.row_id, 0].token_ids == expected


def test_sampled_rows_depend_on_the_row_and_the_seed_alone(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    def sampled(batch: int, seed: int, order: int) -> dict[tuple[object, int], Generation]:
        sampling = SamplingSpec(temperature=0.9, top_p=0.95, max_new_tokens=20, seed=seed)
        many = [Prompt(p.row_id, p.token_ids, sample) for p in prompts for sample in range(3)]
        engine = make_engine(tiny_llama, layers=[2, 4], max_batch=batch, sampling=sampling)
        return run(engine, many[::order])

    first, again, other = sampled(7, 0, 1), sampled(2, 0, -1), sampled(7, 1, 1)
    assert all(same(first[key], again[key]) for key in first)
    assert sum(same(first[key], other[key]) for key in first) < len(first) // 4
    texts = {tuple(first[0, sample].token_ids) for sample in range(3)}
    assert len(texts) == 3, "the samples of a row differ"
