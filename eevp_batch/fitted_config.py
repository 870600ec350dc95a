"""What a job takes from the folders that `fit` and `calibrate` wrote, read without torch.

Knows manifests; the weights are the engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eevp_batch.errors import FittedExitsError
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import ExitSpec, JobSpec

FITTED_FORMAT = 1
FITTED_MANIFEST = "fitted.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `fit` wrote.

    Raises:
        FittedExitsError: it cannot be read, or is of another format.
    """
    path = folder / FITTED_MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FittedExitsError(f"{path}: cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FITTED_FORMAT:
        raise FittedExitsError(f"{path}: format: found {found!r}; allowed: {FITTED_FORMAT}")
    return manifest


def with_fitted_layers(spec: JobSpec, model: ModelConfig) -> JobSpec:
    """The job with the exit layers of its fitted exits where it leaves the layers to them.

    Raises:
        FittedExitsError: they belong to another model, or were fitted for other layers.
    """
    exit = spec.exit
    if exit.mode == "off" or exit.heads is None:
        return spec
    manifest = read_manifest(Path(exit.heads))
    if manifest["model_hash"] != model.content_hash:
        raise FittedExitsError(
            f"exit.heads: {exit.heads}: found exits fitted for a model with hash "
            f"{manifest['model_hash']}; allowed: {model.content_hash}, the hash of {model.id}"
        )
    fitted = list(manifest["exit_layers"])
    if exit.layers == "auto":
        return spec.model_copy(update={"exit": exit.model_copy(update={"layers": fitted})})
    early = [layer for layer in exit.layers if layer != model.num_layers]
    if early != fitted:
        raise FittedExitsError(
            f"exit.layers: found {early}; allowed: auto, or {fitted}, what exit.heads was fitted "
            "for"
        )
    return spec


def heads_hash(exit: ExitSpec) -> str | None:
    """What identifies the fitted exits of a job: the hash of their weights; None without any."""
    if exit.mode == "off" or exit.heads is None:
        return None
    return str(read_manifest(Path(exit.heads))["weights_sha256"])
