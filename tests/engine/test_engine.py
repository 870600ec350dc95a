"""The engine around the rules: failures, memory, stops, kept states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.load import build_engine, load
from eevp_batch.engine.residents import EXPECT_AFTER
from eevp_batch.engine.sequence import Sequence
from eevp_batch.errors import EngineStalledError, FittedExitsError, UsageError
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Generation, Prompt, RowFailure
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec, VocabSpec
from tests.engine.conftest import NEW_TOKENS, greedy, load_model, make_engine, oracle, run
from tests.engine.test_exit_heads import random_head
from tests.tiny_models import NUM_LAYERS

NAN_ID = 319


def watch_releases(pool: KvPool, seen: list[tuple[Sequence, list[Any]]]) -> None:
    """Copy each sequence's keys/values, by layer, just before its pages go back."""
    release = pool.release

    def copying(sequence: Sequence) -> None:
        count = sequence.filled[-1]
        slots = torch.tensor([pool.slot(sequence, position) for position in range(count)])
        kept = [[part.view(count, -1) for part in pool.tokens(i, slots)] for i in range(6)]
        seen.append((sequence, kept))
        release(sequence)

    pool.release = copying  # type: ignore[method-assign]


def test_skipped_layers_hold_projections_of_the_exit_state(
    any_tiny_model: Path, prompts: list[Prompt]
) -> None:
    """`propagate`, checked against the model's own modules over its own hidden states.

    With one early exit the states after it depend on full computation alone, so a plain forward
    over the emitted text gives them.
    """
    exit_layer = 2
    engine = make_engine(any_tiny_model, layers=[exit_layer], threshold=0.2)
    seen: list[tuple[Sequence, list[Any]]] = []
    watch_releases(engine.pool, seen)
    run(engine, prompts)
    model = load_model(any_tiny_model)
    near = {"rtol": 1e-4, "atol": 1e-4}
    num_checked = 0
    for sequence, kept in seen:
        ids = torch.tensor([sequence.token_ids])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states[exit_layer][0]
            cos, sin = model.model.rotary_emb(states[None], torch.arange(len(states))[None])
        for position in range(sequence.num_prompt, sequence.filled[-1]):
            step = position - sequence.num_prompt + 1  # the exit taken with this token as front
            if step >= len(sequence.exits) or sequence.exits[step].exit_layer != exit_layer:
                continue
            for index in range(exit_layer, 6):
                layer = model.model.layers[index]
                with torch.inference_mode():
                    normed = layer.input_layernorm(states[position : position + 1])
                    key = layer.self_attn.k_proj(normed).view(1, 2, -1)
                    if hasattr(layer.self_attn, "k_norm"):
                        key = layer.self_attn.k_norm(key)
                    key = key.transpose(0, 1)[None]
                    at = slice(position, position + 1)
                    _, key = apply_rotary_pos_emb(key, key, cos[:, at], sin[:, at])
                    value = layer.self_attn.v_proj(normed)
                torch.testing.assert_close(kept[index][0][position], key.flatten(), **near)
                torch.testing.assert_close(kept[index][1][position], value.flatten(), **near)
                num_checked += 1
    assert num_checked > 50, "the threshold must let tokens leave and others go deep after them"


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_nan_in_one_row_is_its_own_error(tiny_llama: Path, prompts: list[Prompt], kv: str) -> None:
    """A row whose scores are NaN fails alone, also for those who get its pages next."""
    model = load_model(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_ID] = torch.nan
    limits = {"max_resident": 4}
    clean = [Prompt(p.row_id, [min(i, NAN_ID - 1) for i in p.token_ids]) for p in prompts]
    exits = {"layers": [2, 4], "kv": kv}
    healthy = make_engine(tiny_llama, max_batch=4, limits=limits, model=model, **exits)
    expected = run(healthy, clean)
    poisoned = [Prompt(f"bad-{row}", [5, NAN_ID, *range(10, 40)]) for row in range(6)]
    mixed = [prompt for pair in zip(clean, poisoned * 4, strict=True) for prompt in pair]
    for number, prompt in enumerate(mixed):
        mixed[number] = Prompt(prompt.row_id, prompt.token_ids, tag=number)
    failures = 0
    for result in healthy.generate(mixed):
        if isinstance(result, RowFailure):
            failures += 1
            assert result.error_class == "NonFiniteScoresError" and "bad-" in str(result.row_id)
        else:
            assert result.token_ids == expected[result.row_id, 0].token_ids
    assert failures == 24, "each poisoned row fails, and no other"
    assert healthy.pool.is_empty


def test_a_row_longer_than_memory_is_an_error_row(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama, limits={"max_resident": 2, "kv_memory": 60_000})
    assert engine.pool.max_positions < 120
    results = list(engine.generate([Prompt("long", [5] * 120), Prompt("short", [5, 6])]))
    by_row = {result.row_id: result for result in results}
    assert isinstance(by_row["short"], Generation)
    assert isinstance(by_row["long"], RowFailure)
    assert by_row["long"].error_class == "PromptTooLongError"


@pytest.mark.parametrize("kv", ["propagate", "verify"])
def test_a_row_out_of_time_is_its_own_error(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    """A row that takes too long fails alone, and gives back what it held."""
    engine = make_engine(tiny_llama, max_batch=4, limits={"max_resident": 4}, layers=[2, 4], kv=kv)
    expected = run(engine, prompts)
    slow = {prompt.row_id for prompt in prompts[::3]}
    given = [replace(p, timeout_s=1e-9 if p.row_id in slow else 3600.0) for p in prompts]
    for result in engine.generate(given):
        if result.row_id in slow:
            assert isinstance(result, RowFailure) and result.error_class == "RowTimeoutError"
            assert "run.row_timeout_s" in result.message
        else:
            assert isinstance(result, Generation)
            assert result.token_ids == expected[result.row_id, 0].token_ids
    assert engine.pool.is_empty


def test_prompts_are_pulled_only_as_memory_allows(tiny_llama: Path) -> None:
    """An endless input is fine: the engine asks for no more than it can hold."""
    pulled = 0

    def endless() -> Any:
        nonlocal pulled
        while True:
            pulled += 1
            yield Prompt(pulled, [5, 6, 7])

    engine = make_engine(tiny_llama, max_batch=3, limits={"max_resident": 3})
    results = engine.generate(endless())
    for _ in range(10):
        next(results)
    assert pulled <= 10 + 2 * 3


def test_text_ends_before_the_stop_string(tiny_llama: Path, prompts: list[Prompt]) -> None:
    free = run(make_engine(tiny_llama), prompts)
    key, full = max(free.items(), key=lambda item: len(item[1].text))
    stop = full.text[3:5]
    sampling = SamplingSpec(max_new_tokens=NEW_TOKENS, stop=[stop])
    found = run(make_engine(tiny_llama, sampling=sampling), prompts)[key]
    assert found.finish_reason == "stop"
    assert found.text == full.text[: full.text.index(stop)]
    assert found.token_ids == full.token_ids[: len(found.token_ids)]


def test_the_end_token_ends_and_is_counted(tiny_llama: Path, prompts: list[Prompt]) -> None:
    free = run(make_engine(tiny_llama), prompts)
    common = free[0, 0].token_ids[5]
    model = load_model(tiny_llama)
    model.generation_config.eos_token_id = [1, common]
    found = run(make_engine(tiny_llama, model=model), prompts)[0, 0]
    assert found.finish_reason == "eos"
    assert found.token_ids == free[0, 0].token_ids[: free[0, 0].token_ids.index(common) + 1]


def test_long_prompts_over_the_token_limit_of_a_step(tiny_llama: Path) -> None:
    prompts = [Prompt(row, [3 + row, *range(5, 205)]) for row in range(12)]
    engine = make_engine(tiny_llama, layers=[2, 4], threshold=1.5, max_batch=12)
    engine.queues.max_tokens = 500
    found = run(engine, prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(tiny_llama, prompt)


def test_a_step_that_runs_nothing_while_work_remains_is_an_error(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama)
    squatter = Sequence(Prompt("squatter", [5] * 200), 1, 20, 0)
    engine.pool.admit(squatter, 219, [])
    engine.pool._num_promised = engine.pool.num_pages  # a leak, as a bug would leave it
    engine.add(Prompt("waits for ever", [5, 6, 7]))
    with pytest.raises(EngineStalledError, match="1 sequences wait"):
        engine.step()


def test_k_smaller_than_the_ids_always_kept_is_refused(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    model.generation_config.eos_token_id = [1, 2, 3]
    with pytest.raises(UsageError, match=r"exit\.vocab\.top_k: found 2"):
        make_engine(tiny_llama, layers=[2], top_k=2, model=model)


@pytest.mark.parametrize(
    ("kv", "num_prompts"), [("propagate", 12), ("recompute", 5), ("verify", 5)]
)
def test_bfloat16_rows_do_not_depend_on_their_batch_to_the_last_bit(
    tiny_llama: Path, prompts: list[Prompt], kv: str, num_prompts: int
) -> None:
    """Rounding is coarse there, so near is not enough: it would show in the tokens.

    Long enough for keys to differ in number; small batches meet other kernels (invariance.py).
    """
    settings = {
        "layers": [2, 4],
        "threshold": 0.35,
        "kv": kv,
        "sampling": SamplingSpec(max_new_tokens=80),
    }

    def batches_of(size: int) -> dict[Any, Generation]:
        model = load_model(tiny_llama).bfloat16()
        engine = make_engine(tiny_llama, model=model, max_batch=size, **settings)
        return run(engine, prompts[:num_prompts])

    mixed = batches_of(12)
    for size in (1, 2):
        alone = batches_of(size)
        for key, generation in mixed.items():
            assert alone[key].exits == generation.exits, f"row {key} differs in batches of {size}"


def test_strings_are_encoded_and_a_bad_one_is_its_own_failure(tiny_llama: Path) -> None:
    engine = load(str(tiny_llama), sampling=SamplingSpec(max_new_tokens=4), dtype="float32")
    results = {result.row_id: result for result in engine.generate(["hello", "", "the dog"])}
    assert isinstance(results[1], RowFailure) and results[1].error_class == "EmptyPromptError"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for row, text in ((0, "hello"), (2, "the dog")):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = oracle(load_model(tiny_llama), Prompt(row, ids), max_new_tokens=4)
        assert results[row].token_ids == expected, "a string runs as its chat prompt"


def test_a_library_takes_layers_from_the_fitted_exits(tiny_llama: Path, tmp_path: Path) -> None:
    """As a job does; exits of another model are refused."""
    own = read_model_config(ModelSpec(path=str(tiny_llama))).content_hash
    fitted = FittedExits(own, NUM_LAYERS, 32, (2, 5), {2: random_head(32), 5: random_head(32)})
    fitted.save(tmp_path / "own")
    replace(fitted, model_hash="0" * 64).save(tmp_path / "another")

    def layers(heads: str) -> list[int]:
        exits, short = ExitSpec(heads=str(tmp_path / heads)), SamplingSpec(max_new_tokens=4)
        return list(load(str(tiny_llama), exits, short, dtype="float32").model.exit_layers)

    assert layers("own") == [2, 5, NUM_LAYERS]
    with pytest.raises(FittedExitsError, match=r"exit\.heads: .*another: found exits fitted for"):
        layers("another")


def test_a_string_without_an_encoder_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="found a string"):
        list(make_engine(tiny_llama).generate(["hello"]))


def test_rows_that_run_out_of_pages_start_again_and_come_out_the_same(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    """Memory is promised for what generations had so far, so longer ones can run out of it."""
    sampling = SamplingSpec(max_new_tokens=70)
    settings = {"layers": [2, 4], "threshold": 0.3, "sampling": sampling}
    expected = run(make_engine(tiny_llama, **settings), prompts)
    engine = make_engine(tiny_llama, limits={"max_resident": 6, "kv_memory": 130_000}, **settings)
    engine.stats.finished, engine.stats.exit_histogram[6] = EXPECT_AFTER, 1  # as if all were short
    found = run(engine, prompts)
    assert engine.stats.restarts > 0, "the promise must have been too small here"
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids
        assert found[key].exit_layers == generation.exit_layers


def test_a_model_without_an_end_id_runs_to_the_length(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    model = load_model(tiny_llama)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    exits = ExitSpec(layers=[2], threshold=0.3, vocab=VocabSpec(top_k=32))
    engine = build_engine(model, tokenizer, exits, SamplingSpec(max_new_tokens=8), EngineSpec())
    found = run(engine, prompts[:5])
    assert {g.finish_reason for g in found.values()} == {"length"}
