"""Weights that stay in their safetensors files until somebody needs them.

A model of this kind is a skeleton: its parameters are on torch's `meta` device and take no memory.
`present` reads those of one module for as long as they are looked at, `settle` puts them on a
device for good, so that host memory never holds the whole model twice, nor once where it goes to
a GPU. Both leave a model alone whose weights are in memory already. The mechanics, hooks that
fetch parameters, are accelerate's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
from accelerate.utils import (
    align_module_device,
    has_offloaded_params,
    set_module_tensor_to_device,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from eevp_batch.errors import ModelError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_STORED = "eevp_stored"


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a model folder by name, read whenever one is asked for.

    A tensor is a view of its mapped file, which is unmapped with the last of them: nobody should
    keep one for longer than it takes to copy it, but what `kept` gives.

    Args:
        folder: with safetensors, and their index where there are several.

    Raises:
        OSError, ValueError: the files are not there or are no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._in_use: dict[Path, os.stat_result] = {}
        index = folder / INDEX_FILE
        names = {SINGLE_FILE}
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            try:
                with safe_open(folder / name, framework="pt") as file:
                    for tensor in file.keys():  # noqa: SIM118 - it is no mapping
                        self._files[tensor] = folder / name
                        self._shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{name}: {error}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def kept(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor for good: where it lies in its file, if it has this number type there.

        Its pages count as the file's, not as the process's own: only those that are looked at take
        memory, replicas of one node share them, and the kernel may take them back.
        """
        path = self._files[name]
        before = path.stat()
        found = self[name]
        if found.dtype != dtype:
            return found.to(dtype)
        self._in_use.setdefault(path, before)
        return found

    def check(self) -> None:
        """See that no file was written to in which a `kept` tensor lies.

        One that was replaced as a whole is another file, and what is mapped stays as it was.

        Raises:
            ModelError: one was.
        """
        for path, before in self._in_use.items():
            try:
                now = path.stat()
            except FileNotFoundError:
                continue
            is_same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if is_same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise ModelError(
                    f"{path}: was written to while the model was in use; allowed: to leave a model "
                    "alone until the job is done, or to replace its files as a whole"
                )

    def has_all_of(self, model: PreTrainedModel) -> bool:
        """Whether each parameter of the model is here, under its own name and in its shape."""
        return all(
            self._shapes.get(name) == tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if name != HEAD or not is_tied(model)
        )


class _Tied(Mapping[str, torch.Tensor]):
    """Stored tensors of a model whose head is its embedding."""

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[EMBEDDING if name == HEAD else name]

    def __iter__(self) -> Iterator[str]:
        return iter({*self._stored, HEAD})

    def __len__(self) -> int:
        return len({*self._stored, HEAD})


def skeleton(folder: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
    """The model of a folder, its weights still in their files; None where they need more than that.

    More than that takes a model that is stored quantised, or under other names than it has in
    memory, or one that brings its own code.

    Args:
        folder: with config and safetensors.
        dtype: of its parameters, whatever the files have.
        device: where its modules compute when they are called.

    Raises:
        OSError, ValueError: the files cannot be read.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return None
    stored = StoredTensors(Path(folder))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation="sdpa"
        )
    if not stored.has_all_of(model):
        return None
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    weights = _Tied(stored) if is_tied(model) else stored
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)
    setattr(model, _STORED, stored)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def stored_tensors(model: PreTrainedModel) -> StoredTensors | None:
    """The files of a `skeleton`; None where a model is in memory."""
    return getattr(model, _STORED, None)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the embedding's."""
    return bool(model.config.tie_word_embeddings)


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """Have the parameters of some modules in memory, until the end of the block."""
    with ExitStack() as stack:
        for module in modules:
            for part in module.modules():
                stack.enter_context(align_module_device(part))
        yield


def settle(module: nn.Module, device: torch.device) -> None:
    """Put a module's parameters and buffers on a device for good; each is read straight to it."""
    for part in module.modules():
        if not has_offloaded_params(part):
            continue
        stored: Mapping[str, torch.Tensor] = part._hf_hook.weights_map  # type: ignore[assignment,union-attr]
        names = [name for name, _ in part.named_parameters(recurse=False)]
        remove_hook_from_module(part)
        for name in names:
            value = _copied(stored[name], part.get_parameter(name).dtype, device)
            set_module_tensor_to_device(part, name, device, value=value)
    module.to(device)


def _copied(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Its own copy: a part of a mapped file would keep all of it in memory."""
    return tensor.to(device=device, dtype=dtype, copy=True)


def execution_device(model: PreTrainedModel) -> torch.device:
    """Where the model computes when it is called; its inputs have to be there."""
    hook = getattr(model.lm_head, "_hf_hook", None)
    found: torch.device = model.device if hook is None else torch.device(hook.execution_device)
    return found
