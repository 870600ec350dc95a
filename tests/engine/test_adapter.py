"""An adapter is merged into the weights when a model is laid out; another model's is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from eevp_batch.engine.adapter import Adapter, LowRank, merge
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import MANIFEST, FittedExits
from eevp_batch.engine.load import build_engine, load_weights
from eevp_batch.errors import FittedExitsError
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec
from eevp_batch.tune.lora import LoraModel
from tests.engine.conftest import NEW_TOKENS, greedy, load_model, oracle, run
from tests.tiny_models import NUM_LAYERS, build_model


def changed(model: PreTrainedModel, seed: int = 1, size: float = 0.05) -> LoraModel:
    """The model with a change beside every projection, large enough to change what it says."""
    lora = LoraModel(model, rank=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in lora.modules.values():
        drawn = size * torch.randn(module.up.shape, generator=generator)
        module.up.data.copy_(drawn)
    return lora


def exits_with(adapter: Adapter | None) -> FittedExits:
    """Nothing but an adapter."""
    return FittedExits("abc", NUM_LAYERS, 32, (3,), adapter=adapter)


def engine_of(path: Path, weights: PreTrainedModel, fitted: FittedExits) -> Engine:
    return build_engine(
        weights,
        AutoTokenizer.from_pretrained(path),
        ExitSpec(layers=[3], threshold=2.0),
        SamplingSpec(max_new_tokens=NEW_TOKENS),
        EngineSpec(max_batch=5, max_resident=15),
        fitted,
    )


@pytest.mark.parametrize("stored", [True, False], ids=["in files", "in memory"])
def test_a_merged_engine_says_what_transformers_with_the_change_says(
    any_tiny_model: Path, prompts: list[Prompt], stored: bool
) -> None:
    plain = load_model(any_tiny_model)
    prompts = prompts[:8]
    before = {(p.row_id, 0): greedy(any_tiny_model, p) for p in prompts}
    adapter = changed(plain).adapter()
    expected = {(p.row_id, 0): oracle(plain, p) for p in prompts}
    spec = ModelSpec(path=str(any_tiny_model), dtype="float32")
    weights = load_model(any_tiny_model)
    if stored:
        weights = load_weights(spec, read_model_config(spec))
    found = run(engine_of(any_tiny_model, weights, exits_with(adapter)), prompts)
    assert {key: one.token_ids for key, one in found.items()} == expected
    assert expected != before, "the change is large enough to be seen"
    again = run(engine_of(any_tiny_model, weights, exits_with(adapter)), prompts)
    assert {key: one.token_ids for key, one in again.items()} == expected, "it is merged once"


def test_bfloat16_weights_are_the_rounded_sum(tiny_llama: Path) -> None:
    plain = load_model(tiny_llama)
    adapter = changed(load_model(tiny_llama)).adapter()
    spec = ModelSpec(path=str(tiny_llama), dtype="bfloat16")
    weights = load_weights(spec, read_model_config(spec))
    model = engine_of(tiny_llama, weights, exits_with(adapter)).model
    hidden = torch.randn(4, 32)
    layer, name = plain.model.layers[2], "model.layers.2.self_attn."
    pieces = [("k_proj", layer.self_attn.k_proj), ("v_proj", layer.self_attn.v_proj)]
    normed = layer.input_layernorm(hidden).bfloat16()
    expected = [
        normed @ adapter.changes[name + part].added_to(whole.weight).bfloat16().T
        for part, whole in pieces
    ]
    found = model.layers.kv_of(2, hidden)
    torch.testing.assert_close(found.float(), torch.cat(expected, -1).float(), atol=0.05, rtol=0.02)


def test_what_is_saved_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    exits = exits_with(changed(load_model(tiny_llama)).adapter())
    exits.save(tmp_path)
    found = FittedExits.load(tmp_path).adapter
    assert found is not None and exits.adapter is not None
    assert (found.digest, found.rank) == (exits.adapter.digest, 3)
    other = changed(load_model(tiny_llama), seed=2).adapter()
    assert other.digest != found.digest
    dataclasses.replace(exits, adapter=None).save(tmp_path / "none")
    assert FittedExits.load(tmp_path / "none").adapter is None


@pytest.mark.parametrize("said", ["4", "null", '"3"'])
def test_a_manifest_that_says_another_rank(tiny_llama: Path, tmp_path: Path, said: str) -> None:
    exits_with(changed(load_model(tiny_llama)).adapter()).save(tmp_path)
    manifest = tmp_path / MANIFEST
    manifest.write_text(
        manifest.read_text().replace('"adapter_rank": 3', f'"adapter_rank": {said}')
    )
    with pytest.raises(FittedExitsError, match=r"found an adapter of rank 3|adapter_rank"):
        FittedExits.load(tmp_path)


def test_an_adapter_of_another_model_is_refused(tiny_llama: Path) -> None:
    wider = build_model("llama", hidden_size=64)
    adapter = changed(wider).adapter()
    with pytest.raises(FittedExitsError, match=r"found shape \(32, 64\); allowed: \(32, 32\)"):
        merge(load_model(tiny_llama), adapter)
    deeper = Adapter({"model.layers.9.mlp.up_proj": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(FittedExitsError, match="allowed: None"):
        merge(load_model(tiny_llama), deeper)


def test_two_adapters_do_not_go_into_one_model(tiny_llama: Path) -> None:
    weights = load_model(tiny_llama)
    merge(weights, changed(load_model(tiny_llama), seed=1).adapter())
    with pytest.raises(FittedExitsError, match="another adapter"):
        merge(weights, changed(load_model(tiny_llama), seed=2).adapter())


def test_a_layout_without_the_adapter_is_refused(tiny_llama: Path) -> None:
    weights = load_model(tiny_llama)
    fitted = exits_with(changed(load_model(tiny_llama)).adapter())
    laid_out = engine_of(tiny_llama, weights, exits_with(None)).model
    with pytest.raises(FittedExitsError, match="laid out without"):
        build_engine(
            weights,
            AutoTokenizer.from_pretrained(tiny_llama),
            ExitSpec(layers=[3]),
            SamplingSpec(),
            EngineSpec(),
            fitted,
            cut=laid_out,
        )
