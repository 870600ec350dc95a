"""`recompute` leaves the keys/values of a full forward; `verify` gives what full depth gives.

The oracle is transformers: a plain forward over the emitted tokens, or plain greedy generation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.sequence import Sequence
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import greedy, load_model, make_engine, plain, run
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE

RECALCULATING = ["recompute", "verify"]
DEPTHS = {2: [3], 3: [2, 4], 5: [1, 2, 3, 5]}  # exit layers before the last, by their number D


@cache
def cut(path: Path) -> PreTrainedModel:
    """The model that engines run; its attention becomes theirs."""
    return load_model(path)


def full_forward(
    path: Path, token_ids: list[int]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Scores [T, V], and per layer keys and values [T, num_kv_heads * D], of the whole model."""
    kept = DynamicCache()
    with torch.inference_mode():
        scores = plain(path)(torch.tensor([token_ids]), past_key_values=kept).logits[0]
    flat = [
        (layer.keys[0].transpose(0, 1).flatten(1), layer.values[0].transpose(0, 1).flatten(1))
        for layer in kept.layers
    ]
    return scores, flat


def watch_releases(engine: Engine, seen: list[tuple[Sequence, list[Any]]]) -> None:
    """Copy each sequence's keys/values, by layer, just before its pages go back."""
    pool, release = engine.pool, engine.pool.release
    depth_of = [
        next(d for d, exit in enumerate(engine._model.exit_layers) if index < exit)
        for index in range(NUM_LAYERS)
    ]

    def copying(sequence: Sequence) -> None:
        kept = []
        for index in range(NUM_LAYERS):
            count = sequence.filled[depth_of[index]]
            slots = [pool.slot(sequence, position) for position in range(count)]
            parts = pool.tokens(index, torch.tensor(slots, dtype=torch.int64))
            kept.append([part.flatten(1) for part in parts])
        seen.append((sequence, kept))
        release(sequence)

    pool.release = copying  # type: ignore[method-assign]


def check_keys_and_values(path: Path, seen: list[tuple[Sequence, list[Any]]]) -> int:
    """Compare with a full forward over the emitted tokens, to 1e-5 of a layer's largest entry.

    Returns:
        How many generated tokens have been seen by the last layer.
    """
    num_deep = 0
    for sequence, kept in seen:
        _, expected = full_forward(path, sequence.token_ids)
        for found, reference in zip(kept, expected, strict=True):
            for ours, theirs in zip(found, reference, strict=True):
                near = 1e-5 * max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours, theirs[: len(ours)], rtol=0, atol=near)
        num_deep += len(kept[-1][0]) - sequence.num_prompt
    return num_deep


def check_greedy(path: Path, prompt: Prompt, found: Generation, limit: int) -> None:
    """Each token is the whole model's best one after those before it, up to the end."""
    scores, _ = full_forward(path, [*prompt.token_ids, *found.token_ids[:-1]])
    best = scores[len(prompt.token_ids) - 1 :].argmax(-1).tolist()
    assert found.token_ids == best, f"row {prompt.row_id} is what full depth gives"
    assert len(best) == limit or best[-1] == 1, f"row {prompt.row_id} ends where it should"


@st.composite
def jobs(draw: Any) -> dict[str, Any]:
    """Exits, batch limits and prompts of a small job."""
    num_depths = draw(st.sampled_from(sorted(DEPTHS)))
    layers = DEPTHS[num_depths]
    threshold = st.floats(0, 0.9)
    token_ids = st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=30)
    max_batch = draw(st.integers(1, 6))
    return {
        "layers": layers,
        "threshold": [draw(threshold) for _ in layers],
        "top_k": draw(st.sampled_from([None, 4, 32, VOCAB_SIZE])),
        "max_waiting": draw(st.integers(1, 6)),
        "max_batch": max_batch,
        "limits": {"max_resident": draw(st.integers(1, 2 * max_batch))},
        "sampling": SamplingSpec(max_new_tokens=draw(st.integers(1, 16))),
        "prompts": draw(st.lists(token_ids, min_size=1, max_size=4)),
    }


def run_job(path: Path, job: dict[str, Any], kv: str) -> list[tuple[Prompt, Generation]]:
    """Run a drawn job and check its keys/values; prompts with their generations."""
    settings = {name: value for name, value in job.items() if name != "prompts"}
    engine = make_engine(path, model=cut(path), kv=kv, **settings)
    seen: list[tuple[Sequence, list[Any]]] = []
    watch_releases(engine, seen)
    prompts = [Prompt(row, token_ids) for row, token_ids in enumerate(job["prompts"])]
    found = run(engine, prompts)
    check_keys_and_values(path, seen)
    for generation in found.values():
        assert set(generation.exit_layers) <= {*job["layers"], NUM_LAYERS}
    return [(prompt, found[prompt.row_id, 0]) for prompt in prompts]


few = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@few
@given(job=jobs())
def test_recompute_leaves_the_keys_and_values_of_a_full_forward(
    tiny_model_path: Callable[[str], Path], family: str, job: dict[str, Any]
) -> None:
    run_job(tiny_model_path(family), job, "recompute")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@few
@given(job=jobs())
def test_verify_equals_full_depth(
    tiny_model_path: Callable[[str], Path], family: str, job: dict[str, Any]
) -> None:
    path = tiny_model_path(family)
    for prompt, found in run_job(path, job, "verify"):
        check_greedy(path, prompt, found, job["sampling"].max_new_tokens)


@pytest.mark.parametrize("num_depths", sorted(DEPTHS))
def test_verify_equals_greedy_generation(
    any_tiny_model: Path, prompts: list[Prompt], num_depths: int
) -> None:
    engine = make_engine(
        any_tiny_model,
        layers=DEPTHS[num_depths],
        threshold=0.2,
        kv="verify",
        max_waiting=5,
        model=cut(any_tiny_model),
    )
    seen: list[tuple[Sequence, list[Any]]] = []
    watch_releases(engine, seen)
    found = run(engine, prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)
    assert check_keys_and_values(any_tiny_model, seen) > 300
    stats = engine.stats
    exits = [exit for generation in found.values() for exit in generation.exits]
    early = sum(exit.exit_layer < NUM_LAYERS for exit in exits)
    assert stats.accepted_drafts.total() == early > 0, "what left early was judged, and stands"
    assert stats.rejected_drafts.total() > 20, "wrong drafts were made, and replaced"
    assert stats.tokens == len(exits), "a token that was taken back is not counted"
    assert NUM_LAYERS not in stats.accepted_drafts + stats.rejected_drafts


@pytest.mark.parametrize("num_depths", sorted(DEPTHS))
def test_recompute_that_nobody_leaves_early_is_greedy(
    any_tiny_model: Path, prompts: list[Prompt], num_depths: int
) -> None:
    settings = {"layers": DEPTHS[num_depths], "threshold": 1.5, "kv": "recompute"}
    found = run(make_engine(any_tiny_model, model=cut(any_tiny_model), **settings), prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)


def test_recompute_lets_tokens_leave_and_fills_what_they_skipped(
    any_tiny_model: Path, prompts: list[Prompt]
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.3, "kv": "recompute", "max_waiting": 4}
    engine = make_engine(any_tiny_model, model=cut(any_tiny_model), **settings)
    seen: list[tuple[Sequence, list[Any]]] = []
    watch_releases(engine, seen)
    found = run(engine, prompts)
    assert check_keys_and_values(any_tiny_model, seen) > 300
    runs = [early_runs(generation) for generation in found.values()]
    assert max(max(lengths) for lengths in runs) == 4, "no more tokens wait than may"


def early_runs(generation: Generation) -> list[int]:
    """Lengths of the runs of tokens that left before the last layer."""
    marks = "".join("e" if layer < NUM_LAYERS else " " for layer in generation.exit_layers)
    return [len(run) for run in marks.split(" ")]


@pytest.mark.parametrize("kv", RECALCULATING)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_alone_equals_the_row_in_a_mixed_batch(
    any_tiny_model: Path, prompts: list[Prompt], kv: str, temperature: float
) -> None:
    settings = {
        "layers": [2, 4],
        "threshold": 0.25,
        "kv": kv,
        "max_waiting": 3,
        "model": cut(any_tiny_model),
        "sampling": SamplingSpec(temperature=temperature, max_new_tokens=20),
    }
    mixed = run(make_engine(any_tiny_model, max_batch=7, **settings), prompts[:12])
    one = {"max_resident": 1}
    alone = run(make_engine(any_tiny_model, max_batch=1, limits=one, **settings), prompts[:12])
    for key, generation in mixed.items():
        assert alone[key].token_ids == generation.token_ids, f"row {key} depends on its batch"
        assert alone[key].exit_layers == generation.exit_layers
        assert alone[key].exit_confidences == pytest.approx(generation.exit_confidences, abs=1e-4)
    seen = {layer for generation in mixed.values() for layer in generation.exit_layers}
    assert len(seen) == 3, "tokens leave at every exit"


@few
@given(
    ends=st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=12),
    stop=st.lists(st.sampled_from(["e", "th", " ", "a", "1"]), max_size=2),
    penalty=st.sampled_from([1.0, 1.3]),
    threshold=st.floats(0, 0.6),
    max_waiting=st.integers(1, 6),
)
def test_verify_ends_where_full_depth_ends(
    tiny_llama: Path,
    prompts: list[Prompt],
    ends: list[int],
    stop: list[str],
    penalty: float,
    threshold: float,
    max_waiting: int,
) -> None:
    """Ends that are drafts: end ids, stop strings and lengths, with the penalty's memory."""
    sampling = SamplingSpec(max_new_tokens=12, stop=stop, repetition_penalty=penalty)
    weights = cut(tiny_llama)
    weights.generation_config.eos_token_id = [1, *ends]
    try:
        settings = {"model": weights, "sampling": sampling}
        full = run(make_engine(tiny_llama, **settings), prompts[:8])
        exits = {"layers": [2, 4], "threshold": threshold, "max_waiting": max_waiting}
        found = run(make_engine(tiny_llama, kv="verify", **exits, **settings), prompts[:8])
    finally:
        weights.generation_config.eos_token_id = 1
    for key, generation in full.items():
        assert found[key].token_ids == generation.token_ids
        assert found[key].text == generation.text
        assert found[key].finish_reason == generation.finish_reason
