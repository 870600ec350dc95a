"""The parallel replay says what the sequential engine did, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eevp_batch.engine.cut import end_ids
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.load import build_engine
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ShortPrompt
from eevp_batch.errors import UsageError
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import DecaySpec, EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from eevp_batch.tune.replay import Replay, ReplaySettings
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model, run
from tests.engine.test_bridges import random_bridge
from tests.tiny_models import NUM_LAYERS

NEW_TOKENS = 24
SAMPLING = SamplingSpec(max_new_tokens=NEW_TOKENS)


def tiny_fitted(path: Path, layers: list[int]) -> FittedExits:
    model = load_model(path)
    bridges = {("generated", layer): random_bridge(model, layer, lift=4) for layer in layers}
    bridges["prompt", layers[0]] = random_bridge(model, layers[0], rank=6, lift=4)
    return FittedExits(
        model_hash="",
        num_layers=NUM_LAYERS,
        hidden_size=model.config.hidden_size,
        exit_layers=tuple(layers),
        bridges=bridges,  # type: ignore[arg-type]
        tail=3,
    )


def exit_spec(layers: list[int], thresholds: list[float], **exit: Any) -> ExitSpec:
    vocab = exit.pop("vocab", VocabSpec(top_k=32))
    if exit.get("kv") == "bridge":
        exit["heads"] = "given"
    return ExitSpec(layers=layers, threshold=thresholds, vocab=vocab, **exit)


def engine_for(path: Path, exits: ExitSpec, fitted: FittedExits | None) -> Engine:
    return build_engine(
        load_model(path),
        AutoTokenizer.from_pretrained(path),
        exits,
        SAMPLING,
        EngineSpec(max_batch=5, max_resident=15),
        fitted,
    )


def replay_for(
    path: Path, layers: list[int], exits: ExitSpec, fitted: FittedExits | None, pass_tokens: int
) -> Replay:
    weights = load_model(path)
    model = SegmentedModel(weights, [*layers, NUM_LAYERS])
    if fitted is not None:
        model.use(fitted)
    short = fitted is not None and exits.prefill == "bridge"
    settings = ReplaySettings(
        exits=exits,
        sampling=SAMPLING,
        prune_layer=None if exits.vocab.top_k is None else layers[0],
        always_kept=sorted(end_ids(weights, AutoTokenizer.from_pretrained(path))),
        short_prompt=ShortPrompt(layers[0], 3) if short else None,
    )
    return Replay(model, settings, pass_tokens)


def rows_of(prompts: list[Prompt], found: dict[Any, Generation]) -> list[Row]:
    return [Row(p.token_ids, found[p.row_id, 0].token_ids) for p in prompts]


CASES: list[dict[str, Any]] = [
    {"kv": "propagate"},
    {"kv": "bridge"},
    {"kv": "bridge", "prefill": "bridge"},
    {"kv": "recompute", "max_waiting": 3},
    {"kv": "verify", "max_waiting": 3},
    {"kv": "propagate", "decay": DecaySpec(temperature=4.0)},
    {"kv": "bridge", "vocab": VocabSpec(top_k=None)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layers", [[3], [2, 4]])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_replay_is_what_the_engine_did(
    case: dict[str, Any],
    layers: list[int],
    family: str,
    tiny_model_path: Any,
    prompts: list[Prompt],
) -> None:
    path = tiny_model_path(family)
    thresholds = [0.25, 0.4][: len(layers)]
    exits = exit_spec(layers, thresholds, **case)
    fitted = tiny_fitted(path, layers) if exits.kv == "bridge" else None
    engine_said = run(engine_for(path, exits, fitted), prompts)
    replay = replay_for(path, layers, exits, fitted, pass_tokens=300)
    grid = [[1.5] * len(layers), thresholds, [0.0] * len(layers)]
    by_setting = replay.run(rows_of(prompts, engine_said), grid)
    for prompt, found in zip(prompts, by_setting[1], strict=True):
        expected = engine_said[prompt.row_id, 0]
        assert found.token_ids == expected.token_ids, "the same text comes out"
        assert found.exit_layers == [exit.exit_layer for exit in expected.exits]
        confidences = [exit.confidence for exit in expected.exits]
        assert found.confidences == pytest.approx(confidences, abs=1e-4)
    layers_seen = {layer for found in by_setting[1] for layer in found.exit_layers}
    assert layers_seen == {*layers, NUM_LAYERS}, "tokens leave everywhere, or nothing is shown"
    assert {layer for found in by_setting[0] for layer in found.exit_layers} == {NUM_LAYERS}


def test_the_order_of_settings_and_the_size_of_passes_change_nothing(
    tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    path, layers = tiny_model_path("llama"), [2, 4]
    exits = exit_spec(layers, [0.3, 0.3], kv="bridge", prefill="bridge")
    fitted = tiny_fitted(path, layers)
    rows = rows_of(prompts, run(engine_for(path, exits, fitted), prompts))
    grid = [[0.1, 0.2], [0.3, 0.3], [0.9, 0.1]]
    forth = replay_for(path, layers, exits, fitted, pass_tokens=2000).run(rows, grid)
    back = replay_for(path, layers, exits, fitted, pass_tokens=100).run(rows[::-1], grid[::-1])
    for some, others in zip(forth, back[::-1], strict=True):
        assert [(f.exit_layers, f.token_ids) for f in some] == [
            (f.exit_layers, f.token_ids) for f in others[::-1]
        ]


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_a_shared_beginning_is_replayed_as_it_was_run(
    case: dict[str, Any], tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    path, layers, thresholds = tiny_model_path("llama"), [2, 4], [0.25, 0.4]
    shared = [5 + number % 200 for number in range(60)]
    prompts = [Prompt(p.row_id, [*shared, *p.token_ids]) for p in prompts]
    exits, fitted = exit_spec(layers, thresholds, **case), tiny_fitted(path, layers)
    engine = engine_for(path, exits, fitted)
    engine_said = run(engine, prompts)
    assert engine.stats.shared_tokens, "the engine shares it too"
    replay = replay_for(path, layers, exits, fitted, pass_tokens=100)
    found = replay.run(rows_of(prompts, engine_said), [thresholds])[0]
    for prompt, replayed in zip(prompts, found, strict=True):
        expected = engine_said[prompt.row_id, 0]
        assert replayed.token_ids == expected.token_ids
        assert replayed.exit_layers == [exit.exit_layer for exit in expected.exits]


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"repetition_penalty": 1.2}])
def test_what_cannot_be_replayed_is_refused(
    setting: dict[str, float], tiny_model_path: Any
) -> None:
    path = tiny_model_path("llama")
    model = SegmentedModel(load_model(path), [3, NUM_LAYERS])
    exits = exit_spec([3], [0.5])
    settings = ReplaySettings(exits, SamplingSpec(**setting), 3, [1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="where exits are replayed"):
        Replay(model, settings)
