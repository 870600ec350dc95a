"""Where the training of an adapter is, kept in a folder: tensors and JSON, no pickles.

The JSON file names the tensors and their hash and is replaced last, so that whatever is killed
when, the folder holds one whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

PROGRESS = "adapter-training.json"
_TENSORS = "adapter-training-{step:06d}.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training after some steps.

    Attributes:
        key: what it trains, on what; another training takes nothing from it.
        step: steps done.
        total: steps that it will have.
        seconds: spent so far.
        curve: losses so far.
        tensors: parameters, and the optimizer's state of each.
    """

    key: str
    step: int
    total: int
    seconds: float
    curve: list[dict[str, Any]]
    tensors: Mapping[str, torch.Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    content = format_safetensors({n: t.contiguous().cpu() for n, t in checkpoint.tensors.items()})
    name = _TENSORS.format(step=checkpoint.step)
    _write(folder / name, content)
    facts = {
        "key": checkpoint.key,
        "step": checkpoint.step,
        "total": checkpoint.total,
        "seconds": checkpoint.seconds,
        "curve": checkpoint.curve,
        "tensors": name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    _write(folder / PROGRESS, json.dumps(facts).encode())
    for other in folder.glob(_TENSORS.format(step=0).replace("000000", "*")):
        if other.name != name:
            other.unlink()


def load(folder: Path, key: str) -> Checkpoint | None:
    """The folder's checkpoint of this training; None where there is none that is whole."""
    try:
        facts = json.loads((folder / PROGRESS).read_bytes())
        if facts["key"] != key:
            return None
        content = (folder / Path(facts["tensors"]).name).read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return None
        fields = {name: facts[name] for name in ("key", "step", "total", "seconds", "curve")}
        return Checkpoint(**fields, tensors=parse_safetensors(content))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def remove(folder: Path) -> None:
    """Leave nothing of a checkpoint."""
    (folder / PROGRESS).unlink(missing_ok=True)
    for path in folder.glob("adapter-training-*.safetensors"):
        path.unlink()


def _write(path: Path, content: bytes) -> None:
    """Give a file its name when it is whole and on the disk."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
