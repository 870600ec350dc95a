from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.errors import ModelError, SpecError, UsageError
from eevp_batch.model_config import (
    ModelConfig,
    hash_model,
    prompt_room,
    read_model_config,
    resolve_exit_layers,
    resolve_prune_layer,
)
from eevp_batch.spec import ExitSpec, ModelSpec, SamplingSpec, VocabSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


ENDLESS = b'{"w":{"data_offsets":[0,1e9999]}}'


def safetensors(data: bytes) -> bytes:
    """One tensor of bytes in the safetensors format."""
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    )
    return len(header).to_bytes(8, "little") + header.encode() + data


def write_model(folder: Path, config: dict[str, Any] = CONFIG, data: bytes = bytes(4096)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(data))
    return folder


def read(folder: Path) -> ModelConfig:
    return read_model_config(ModelSpec(path=str(folder)))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder)
    return str(caught.value)


def test_a_folder_says_what_shape_its_model_has(tmp_path: Path) -> None:
    model = read(write_model(tmp_path / "m"))
    shape = (model.num_layers, model.num_heads, model.num_kv_heads, model.head_size)
    assert shape == (6, 4, 2, 8), "the head size is the width shared out over the heads"
    assert (model.path, model.id, model.revision) == (
        str(tmp_path / "m"),
        str(tmp_path / "m"),
        None,
    )
    assert model.kv_bytes_per_token("float32") == 2 * 6 * 2 * 8 * 4


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama"])
def test_silent_configurations_get_the_family_s_own_defaults(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in CONFIG.items() if "key_value" not in key}
    model = read(write_model(tmp_path, config | {"model_type": family}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert model.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or 8
    assert model.head_size == head_dim


def test_real_folders_agree_with_the_weights(any_tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = read(any_tiny_model)
    weights = transformers.AutoModelForCausalLM.from_pretrained(any_tiny_model)
    layer = weights.model.layers[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert model.layer_weights == matrices, "the weights of a layer are those of its matrices"
    assert model.head_weights == weights.get_output_embeddings().weight.numel()
    assert model.num_layers == len(weights.model.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type: found "gpt2"; allowed: llama, mistral, qwen2, qwen3'),
        ({"model_type": None}, "model_type: found null"),
        ({"num_hidden_layers": None}, "num_hidden_layers: found null; allowed: 1 or more"),
        ({"hidden_size": "32"}, 'hidden_size: found "32"'),
        ({"vocab_size": True}, "vocab_size: found true"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: found 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: found quantised weights"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    text = refusal(write_model(tmp_path, CONFIG | change))
    assert message in text and str(tmp_path / "config.json") in text


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("config.json"), "config.json: found no such file"),
    "config not JSON": (_write("config.json", b"{"), "allowed: JSON"),
    "config not an object": (_write("config.json", b"[]"), "found list; allowed: a JSON object"),
    "config not UTF-8": (_write("config.json", b'{"a": "\xff\xff"}'), "allowed: JSON"),
    "no weights": (_remove("model.safetensors"), "found no weights; allowed: model.safetensors"),
    "cut short": (_write("model.safetensors", safetensors(bytes(99))[:-1]), "as its header says"),
    "too long": (_write("model.safetensors", safetensors(bytes(99)) + b"x"), "as its header says"),
    "no header": (_write("model.safetensors", b"PK"), "found no safetensors header"),
    "an endless tensor": (
        _write("model.safetensors", (33).to_bytes(8, "little") + ENDLESS),
        "found a broken header",
    ),
    "a broken header": (
        _write("model.safetensors", (2).to_bytes(8, "little") + b"{,"),
        "found a broken header",
    ),
    "an index without its file": (
        _write("model.safetensors.index.json", b'{"weight_map": {"w": "a-00001.safetensors"}}'),
        "found no a-00001.safetensors",
    ),
    "a broken index": (_write("model.safetensors.index.json", b"{}"), "an index of weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(tmp_path: Path, case: str) -> None:
    break_it, message = BROKEN[case]
    break_it(write_model(tmp_path))
    text = refusal(tmp_path)
    assert message in text and str(tmp_path) in text


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "only pytorch_model.bin, which may run code when read" in refusal(tmp_path)


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    assert "found no such folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "found a file" in refusal(tmp_path / "file")
    with pytest.raises(ModelError, match="found no such folder"):
        read_model_config(ModelSpec(path="a b/c"))


def test_a_hub_id_that_cannot_be_had_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="found neither a folder nor a hub model"):
        read_model_config(ModelSpec(path="nobody-at-all/no-such-model"))


# --- the content hash --------------------------------------------------------------------------


def test_the_hash_is_of_content_not_of_place(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (second / "README.md").write_text("words about the model")
    assert hash_model(first) == hash_model(second)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_hash_changes_with_every_small_file(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path)
    before = hash_model(folder)
    (folder / name).write_text('{"other": 1}')
    assert hash_model(folder) != before, f"{name} changes the model's identity"


@pytest.mark.parametrize("place", [0, 1, 1 << 20, (3 << 20) - 1])
def test_the_hash_sees_the_ends_of_the_weights(tmp_path: Path, place: int) -> None:
    data = bytearray(3 << 20)
    before = hash_model(write_model(tmp_path, data=bytes(data)))
    data[place] = 1
    after = hash_model(write_model(tmp_path, data=bytes(data)))
    sampled = place < (1 << 20) or place >= (2 << 20)
    assert (after != before) or not sampled, f"byte {place} is in the first or the last MiB"


def test_the_hash_sees_weights_that_change_everywhere(tmp_path: Path) -> None:
    same_ends = bytes(1 << 20)
    first = hash_model(write_model(tmp_path, data=same_ends + bytes(8 << 20) + same_ends))
    second = hash_model(write_model(tmp_path, data=same_ends + b"\1" * (8 << 20) + same_ends))
    assert first != second, "the blocks between the ends are part of the hash"


def test_files_cannot_trade_bytes(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (first / "a.json").write_text("12")
    (first / "b.json").write_text("3")
    (second / "a.json").write_text("1")
    (second / "b.json").write_text("23")
    assert hash_model(first) != hash_model(second)


# --- exit layers -----------------------------------------------------------------------------


@given(st.integers(1, 200))
def test_auto_cuts_into_thirds_and_keeps_the_last_layer(num_layers: int) -> None:
    layers = resolve_exit_layers(ExitSpec(), num_layers)
    assert layers == sorted(set(layers)), "exit layers increase"
    assert layers[0] >= 1 and layers[-1] == num_layers
    if num_layers >= 3:
        assert layers == [num_layers // 3, 2 * num_layers // 3, num_layers]


@given(st.sets(st.integers(1, 30), min_size=1).map(sorted))
def test_explicit_layers_gain_the_last_one(layers: list[int]) -> None:
    assert resolve_exit_layers(ExitSpec(layers=layers), 30) == sorted({*layers, 30})


def test_exits_off_leaves_the_last_layer_alone() -> None:
    exit = ExitSpec(mode="off", layers=[99], threshold=[0.1, 0.2])
    assert resolve_exit_layers(exit, 6) == [6]
    assert resolve_prune_layer(exit, [6]) is None, "nothing is pruned where nothing exits"


@pytest.mark.parametrize(
    ("exit", "field", "allowed"),
    [
        (ExitSpec(layers=[2, 7]), "exit.layers", "1 to 6"),
        (ExitSpec(threshold=[0.5]), "exit.threshold", "2, one for each exit layer"),
        (ExitSpec(layers=[6], threshold=[0.5]), "exit.threshold", "0, one for each"),
        (ExitSpec(threshold=[0.1, 0.2, 0.3]), "exit.threshold", "before the last of [2, 4, 6]"),
    ],
)
def test_exits_that_do_not_fit_the_model_are_refused(
    exit: ExitSpec, field: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_exit_layers(exit, 6)
    assert caught.value.field == field and allowed in caught.value.allowed
    assert isinstance(caught.value, UsageError)


def test_the_vocabulary_is_cut_at_an_exit_layer_before_the_last() -> None:
    layers = [2, 4, 6]
    assert resolve_prune_layer(ExitSpec(), layers) == 2
    assert resolve_prune_layer(ExitSpec(vocab=VocabSpec(prune_layer=4)), layers) == 4
    assert resolve_prune_layer(ExitSpec(vocab=VocabSpec(top_k=None)), layers) is None
    for wrong in (1, 3, 6, 7):
        with pytest.raises(SpecError, match=r"exit\.vocab\.prune_layer.*2, 4"):
            resolve_prune_layer(ExitSpec(vocab=VocabSpec(prune_layer=wrong)), layers)


def test_a_generation_leaves_room_for_a_prompt(tmp_path: Path) -> None:
    model = read(write_model(tmp_path))
    assert prompt_room(SamplingSpec(max_new_tokens=255), model) == 1
    with pytest.raises(SpecError, match="at most 255"):
        prompt_room(SamplingSpec(max_new_tokens=256), model)


def test_an_index_that_leads_out_of_the_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"w": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no name of a file"):
        hash_model(folder)


def test_an_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"found adapter_config\.json"):
        hash_model(folder)


def test_code_and_pickles_in_a_model_folder_do_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    from eevp_batch.engine.load import load

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w')\n"
    for name in ("modeling_evil", "tokenization_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(evil)
    # A pickle that writes the file when it is read, under every name that somebody might read.
    pickle = f"cbuiltins\nexec\n(V{evil.strip()}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(pickle)
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    tokens = {"AutoTokenizer": ["tokenization_evil.T", None]}
    for name, maps in (("config.json", auto), ("tokenizer_config.json", tokens)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": maps}))
    with contextlib.suppress(ModelError):  # refusing the folder is as good
        load(str(folder), sampling=SamplingSpec(max_new_tokens=8), dtype="float32")
    assert not ran.exists(), "code of the model folder ran"
