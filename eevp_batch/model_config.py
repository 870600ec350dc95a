"""What a model folder says about itself, read without torch: shape, identity, exit layers.

Knows `config.json`, safetensors headers and hashes. Loading weights is the engine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eevp_batch.errors import ModelError, SpecError, first_line
from eevp_batch.spec import ExitSpec, ModelSpec, SamplingSpec
from eevp_batch.uri_secrets import ALLOWED_CREDENTIALS, has_secret

# What the configuration class of each family in transformers fills in where config.json is silent.
FAMILIES: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,199}")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.py"]
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
_END_BYTES, _BLOCK_BYTES, _NUM_BLOCKS = 1 << 20, 64 << 10, 16
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own bound


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and identity.

    Attributes:
        path: local folder.
        model_type: `llama`, `mistral`, `qwen2` or `qwen3`.
        context_length: most positions, prompt and generation together.
        id: what the user wrote: folder or hub id.
        revision: of a hub id, the commit that was resolved; else what the user wrote.
        content_hash: hex sha256, see `hash_model`.
    """

    path: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    id: str
    revision: str | None
    content_hash: str

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        width = self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.hidden_size * (width + 3 * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Weights in the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token's keys and values.

        Args:
            dtype: as in `model.dtype`.
        """
        return self.kv_values_per_token * DTYPE_BYTES[dtype]


def read_model_config(spec: ModelSpec) -> ModelConfig:
    """Read a model's shape and identity from its folder; a hub id is downloaded first.

    Raises:
        ModelError: the folder or hub id is missing, its family is not supported, its weights are
            not safetensors, or a file is cut short.
    """
    folder, revision = _local_folder(spec)
    raw = _read_config(folder)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"{folder / 'config.json'}: model_type: found {json.dumps(family)}; "
            f"allowed: {', '.join(FAMILIES)}"
        )
    if raw.get("quantization_config") is not None:
        raise ModelError(
            f"{folder / 'config.json'}: quantization_config: found quantised weights; "
            "allowed: weights in bfloat16, float16 or float32"
        )
    config = FAMILIES[family] | {key: value for key, value in raw.items() if value is not None}
    hidden_size, num_heads = (
        _count(folder, config, name) for name in ("hidden_size", "num_attention_heads")
    )
    config.setdefault("num_key_value_heads", num_heads)
    config.setdefault("head_dim", hidden_size // num_heads)
    return ModelConfig(
        path=str(folder),
        model_type=family,
        num_layers=_count(folder, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_count(folder, config, "num_key_value_heads"),
        head_size=_count(folder, config, "head_dim"),
        intermediate_size=_count(folder, config, "intermediate_size"),
        vocab_size=_count(folder, config, "vocab_size"),
        context_length=_count(folder, config, "max_position_embeddings"),
        id=spec.path,
        revision=revision,
        content_hash=hash_model(folder),
    )


def hash_model(folder: Path) -> str:
    """Hash what a model's output depends on, without reading all of its weights.

    sha256 over, in order of their names: name and size of every configuration, tokenizer, template,
    code and safetensors file at the top of the folder; the bytes of all but the safetensors; and of
    each safetensors file its header, its first and last MiB, and 16 evenly spaced blocks of 64 KiB.
    Two fine-tunings of one model differ in the blocks; a change of a few weights may go unseen.

    Raises:
        ModelError: there is no safetensors file, one is missing or cut short.
    """
    digest = hashlib.sha256()
    weights = _weight_files(folder)
    small = [path for path in folder.iterdir() if path.is_file() and path.suffix in _SMALL_FILES]
    for path in sorted([*small, *weights], key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in _sample(path) if path in weights else [path.read_bytes()]:
            digest.update(block)
    return digest.hexdigest()


def resolve_exit_layers(exit: ExitSpec, num_layers: int) -> list[int]:
    """The layers after which a token may leave, increasing, the last layer always among them.

    Args:
        exit: exits off gives the last layer alone; `auto` the thirds of the model, or the last
            layer alone where exits are yet to be learned.
        num_layers: L.

    Raises:
        SpecError: a layer is not in the model, or the thresholds do not fit the layers.
    """
    if exit.mode == "off" or (exit.mode == "learn" and exit.layers == "auto"):
        return [num_layers]
    if exit.layers == "auto":
        layers = sorted({max(1, num_layers // 3), max(1, 2 * num_layers // 3), num_layers})
    else:
        layers = sorted({*exit.layers, num_layers})
    if layers[-1] > num_layers:
        raise _wrong("exit.layers", layers[-1], f"1 to {num_layers}, the model's layers")
    if isinstance(exit.threshold, list) and len(exit.threshold) != len(layers) - 1:
        allowed = f"{len(layers) - 1}, one for each exit layer before the last of {layers}"
        raise _wrong("exit.threshold", f"{len(exit.threshold)} thresholds", allowed)
    return layers


def resolve_prune_layer(exit: ExitSpec, exit_layers: list[int]) -> int | None:
    """The exit layer where the vocabulary is cut; None where it never is.

    Args:
        exit: exits.
        exit_layers: what `resolve_exit_layers` gave.

    Raises:
        SpecError: it is not an exit layer before the last.
    """
    early = exit_layers[:-1]
    if exit.vocab.top_k is None or not early:
        return None
    if exit.vocab.prune_layer == "first":
        return early[0]
    if exit.vocab.prune_layer not in early:
        allowed = f"first, or an exit layer before the last: {', '.join(map(str, early))}"
        raise _wrong("exit.vocab.prune_layer", exit.vocab.prune_layer, allowed)
    return exit.vocab.prune_layer


def prompt_room(sampling: SamplingSpec, model: ModelConfig) -> int:
    """Most prompt tokens that the model's context leaves beside the generation.

    Raises:
        SpecError: it leaves none.
    """
    room = model.context_length - sampling.max_new_tokens
    if room < 1:
        allowed = f"at most {model.context_length - 1}, for the model's context has "
        allowed += f"{model.context_length} tokens"
        raise _wrong("sampling.max_new_tokens", sampling.max_new_tokens, allowed)
    return room


def _wrong(field: str, found: Any, allowed: str) -> SpecError:
    """An error in a field whose file and line are not known here."""
    return SpecError("job file", None, field, found, allowed)


def _local_folder(spec: ModelSpec) -> tuple[Path, str | None]:
    """The model's folder on this machine, and its revision."""
    if has_secret(spec.path):
        raise ModelError(
            "model.path: found a URI with a password or an access key; allowed: a folder or a hub "
            f"id, and {ALLOWED_CREDENTIALS}"
        )
    folder = Path(spec.path)
    if folder.is_dir():
        return Path(os.path.abspath(folder)), spec.revision
    if folder.exists() or folder.is_absolute() or not _HUB_ID.fullmatch(spec.path):
        found = "a file" if folder.exists() else "no such folder"
        raise ModelError(f"model.path: {spec.path}: found {found}; allowed: a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(spec.path, revision=spec.revision, allow_patterns=_HUB_FILES)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {spec.path}: found neither a folder nor a hub model "
            f"({first_line(error)}); "
            "allowed: a folder or a hub id"
        ) from error
    # The hub's cache names a snapshot's folder after its commit.
    return Path(local), Path(local).name


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: found no such file; allowed: a model's config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: found {error}; allowed: JSON") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: found {type(raw).__name__}; allowed: a JSON object")
    return raw


def _count(folder: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = json.dumps(value)
        raise ModelError(f"{folder / 'config.json'}: {key}: found {found}; allowed: 1 or more")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: found adapter_config.json; allowed: a model with it merged")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if not all(_FILE_NAME.fullmatch(name) for name in names):
                raise ValueError("what is no name of a file")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: found {error!r}; allowed: an index of weights") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: found no {missing[0]}; allowed: every file of its index")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {pickles[0]}, which may run code when read" if pickles else "no weights"
    raise ModelError(f"{folder}: found {found}; allowed: model.safetensors")


def _sample(path: Path) -> Iterator[bytes]:
    """Header, ends and evenly spaced blocks of a safetensors file.

    The format: 8 bytes little-endian header size, a JSON header with each tensor's
    `data_offsets`, then the tensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as source:
        header_bytes = int.from_bytes(source.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{path}: found no safetensors header; allowed: a safetensors file")
        header = source.read(header_bytes)
        expected = 8 + header_bytes + _data_bytes(path, header)
        if expected != size:
            raise ModelError(f"{path}: found {size} bytes; allowed: {expected}, as its header says")
        yield header
        blocks = [(0, _END_BYTES), (max(0, size - _END_BYTES), _END_BYTES)]
        blocks += [(size * k // _NUM_BLOCKS, _BLOCK_BYTES) for k in range(_NUM_BLOCKS)]
        for start, length in blocks:
            source.seek(start)
            yield source.read(length)


def _data_bytes(path: Path, header: bytes) -> int:
    try:
        tensors = json.loads(header)
        ends = [int(t["data_offsets"][1]) for name, t in tensors.items() if name != "__metadata__"]
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise ModelError(f"{path}: found a broken header; allowed: a safetensors file") from None
    return max(ends, default=0)
