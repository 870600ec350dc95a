"""Weights that stay in their files: the same model, read piece by piece."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine, load_weights
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.stored_weights import INDEX_FILE, SINGLE_FILE, present, settle, skeleton
from eevp_batch.errors import ModelError
from eevp_batch.model_config import read_model_config
from eevp_batch.records import Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec, VocabSpec
from tests.engine.conftest import load_model, make_engine, needs_vnni, run
from tests.tiny_models import save_model

CPU, META = torch.device("cpu"), torch.device("meta")


def test_parameters_are_there_while_they_are_looked_at(any_tiny_model: Path) -> None:
    model = skeleton(str(any_tiny_model), torch.float32, CPU)
    assert model is not None and {p.device for p in model.parameters()} == {META}
    expected = load_model(any_tiny_model)
    layers = zip(model.model.layers, expected.model.layers, strict=True)
    for module, whole in [*layers, (model.lm_head, expected.lm_head)]:
        with present(module):
            for (name, found), (_, there) in zip(
                module.named_parameters(), whole.named_parameters(), strict=True
            ):
                assert torch.equal(found, there), name
    assert {p.device for p in model.parameters()} == {META}, "and gone afterwards"
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, expected(ids).logits), "it can be called as a whole"
    settle(model, CPU)
    assert {p.device for p in model.parameters()} == {CPU}
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("proposal", ["full", pytest.param("int8", marks=needs_vnni), "low_rank"])
def test_an_engine_of_stored_weights_gives_the_same(
    any_tiny_model: Path, prompts: list[Prompt], proposal: str
) -> None:
    spec = ModelSpec(path=str(any_tiny_model), dtype="float32")
    weights = load_weights(spec, read_model_config(spec))
    assert {p.device for p in weights.parameters()} == {META}, "nothing is read yet"
    vocab = VocabSpec(top_k=32, proposal=proposal)  # type: ignore[arg-type]
    engine = build_engine(
        weights,
        AutoTokenizer.from_pretrained(any_tiny_model),
        ExitSpec(layers=[2, 4], threshold=0.3, vocab=vocab),
        SamplingSpec(max_new_tokens=20),
        EngineSpec(max_batch=5, max_resident=15),
    )
    settings = {"layers": [2, 4], "vocab": {"proposal": proposal}}
    expected = run(make_engine(any_tiny_model, **settings), prompts)
    found = run(engine, prompts)
    assert all(found[key].exits == generation.exits for key, generation in expected.items())


def stored_engine(folder: Path) -> Engine:
    """Without exits, its weights read as a job reads them."""
    spec = ModelSpec(path=str(folder), dtype="float32")
    return build_engine(
        load_weights(spec, read_model_config(spec)),
        AutoTokenizer.from_pretrained(folder),
        ExitSpec(mode="off"),
        SamplingSpec(max_new_tokens=4),
        EngineSpec(),
    )


def test_the_vocabulary_s_weights_stay_in_their_file(any_tiny_model: Path) -> None:
    spec = ModelSpec(path=str(any_tiny_model), dtype="float32")
    model = SegmentedModel(load_weights(spec, read_model_config(spec)), [6])
    expected = load_model(any_tiny_model)
    assert torch.equal(model.head_weight, expected.lm_head.weight)
    embedded = model.layers.embed(torch.arange(expected.config.vocab_size))
    assert torch.equal(embedded, expected.model.embed_tokens.weight)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    of_file = [
        line.split()[0] for line in mapped if line.endswith(str(any_tiny_model / SINGLE_FILE))
    ]
    ranges = [tuple(int(end, 16) for end in line.split("-")) for line in of_file]
    address = model.head_weight.data_ptr()
    assert any(start <= address < stop for start, stop in ranges), "no copy was made"
    other = SegmentedModel(
        load_weights(spec.model_copy(update={"dtype": "bfloat16"}), read_model_config(spec)), [6]
    )
    assert torch.equal(other.head_weight, expected.lm_head.weight.bfloat16())


def test_a_model_whose_files_are_replaced_goes_on_as_it_was(
    tmp_path: Path, prompts: list[Prompt]
) -> None:
    file = save_model("llama", tmp_path) / SINGLE_FILE
    content = file.read_bytes()
    engine = stored_engine(tmp_path)
    expected = run(engine, prompts)
    replacing = tmp_path / "new"
    replacing.write_bytes(content[:-8] + bytes(8))
    replacing.replace(file)
    found = run(engine, prompts)
    assert {key: found[key].token_ids for key in found} == {
        key: generation.token_ids for key, generation in expected.items()
    }, "another file has taken the name, and the engine has the old one"


def test_a_model_that_is_overwritten_in_use_is_noticed(
    tmp_path: Path, prompts: list[Prompt]
) -> None:
    file = save_model("llama", tmp_path) / SINGLE_FILE
    engine = stored_engine(tmp_path)
    run(engine, prompts)
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(bytes(8))
    with pytest.raises(ModelError, match="was written to while the model was in use"):
        run(engine, prompts)


def test_several_files_and_another_number_type(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    (tmp_path / SINGLE_FILE).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / INDEX_FILE).write_text(index)
    model = skeleton(str(tmp_path), torch.bfloat16, CPU)
    assert model is not None
    with present(model.lm_head):
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].bfloat16())


def test_what_is_stored_otherwise_is_left_to_transformers(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    file = tmp_path / SINGLE_FILE
    renamed = {name.removeprefix("model."): t for name, t in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    assert skeleton(str(tmp_path), torch.float32, CPU) is None
    file.write_bytes(file.read_bytes()[:-4])
    spec = ModelSpec(path=str(tmp_path))
    config = read_model_config(ModelSpec(path=str(save_model("llama", tmp_path / "whole"))))
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        load_weights(spec, replace(config, path=str(tmp_path)))
