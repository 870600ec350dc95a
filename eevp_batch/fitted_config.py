"""What a job takes from the folders that `fit` and `calibrate` wrote, read without torch.

Knows manifests; the weights are the engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eevp_batch.calibration_file import Binding, Calibration
from eevp_batch.errors import CalibrationError, FittedExitsError
from eevp_batch.model_config import ModelConfig, resolve_exit_layers, resolve_prune_layer
from eevp_batch.spec import ExitSpec, JobSpec

AFFINE_FORMAT, MLP_FORMAT, MIX_FORMAT = FORMATS = (1, 2, 3)
"""Of a folder: whoever reads the first would miss a head's MLP, and whoever reads the second a
proposal whose larger factor is made from the head on loading."""
FITTED_MANIFEST = "fitted.json"
# Type by name of what is read from a manifest; of the exit layers, that of each.
_READ_FIELDS = {
    "model_hash": str,
    "weights_sha256": str,
    "exit_layers": int,
    "num_layers": int,
    "hidden_size": int,
    "tail": int,
    "lead": int,
}
_OPTIONAL_FIELD = "adapter_rank"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `fit` wrote.

    Raises:
        FittedExitsError: it cannot be read, or is of another format.
    """
    path = folder / FITTED_MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FittedExitsError(f"{path}: cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found not in FORMATS:
        allowed = ", ".join(map(str, FORMATS))
        raise FittedExitsError(f"{path}: format: found {found!r}; allowed: {allowed}")
    for name, kind in _READ_FIELDS.items():
        value = manifest.get(name)
        items = value if name == "exit_layers" and isinstance(value, list) else [value]
        if not all(type(item) is kind for item in items):
            shown = repr(value)[:80]
            raise FittedExitsError(f"{path}: {name}: found {shown}; allowed: {kind.__name__}")
    rank = manifest.setdefault(_OPTIONAL_FIELD, None)
    if rank is not None and type(rank) is not int:
        shown = repr(rank)[:80]
        raise FittedExitsError(f"{path}: {_OPTIONAL_FIELD}: found {shown}; allowed: int or null")
    return manifest


def has_adapter(exit: ExitSpec) -> bool:
    """Whether a job runs an adapted model, of which full depth is no longer the original's.

    Raises:
        FittedExitsError: its fitted exits cannot be read.
    """
    if exit.mode != "on" or exit.heads is None:
        return False
    return read_manifest(Path(exit.heads))[_OPTIONAL_FIELD] is not None


def with_fitted(spec: JobSpec, model: ModelConfig) -> JobSpec:
    """The job with the exit layers and thresholds that it leaves to the files that it names.

    Raises:
        FittedExitsError: the fitted exits belong to another model, or to other layers.
        CalibrationError: the calibration certifies something else, or the job samples and is to
            learn exits.
    """
    if spec.exit.mode == "learn":
        refuse_sampling(spec)
        return spec
    return with_certified_thresholds(with_fitted_layers(spec, model), model)


def with_fitted_layers(spec: JobSpec, model: ModelConfig) -> JobSpec:
    """The job with the exit layers of its fitted exits where it leaves the layers to them.

    Raises:
        FittedExitsError: they belong to another model, were fitted for other layers, or have an
            adapter where the whole model is to verify.
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
    if manifest[_OPTIONAL_FIELD] is not None and exit.kv == "verify":
        raise FittedExitsError(
            f"exit.kv: found verify beside exit.heads with an adapter ({exit.heads}); allowed: "
            "bridge, propagate or recompute, for what an adapted model verifies is its own output, "
            "not the original's"
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


def with_certified_thresholds(spec: JobSpec, model: ModelConfig) -> JobSpec:
    """The job with the thresholds of its calibration, and its layers where nothing else names any.

    Args:
        spec: a job whose layers have been taken from its fitted exits, see `with_fitted_layers`.
        model: its model.

    Raises:
        CalibrationError: it cannot be read, or the job is not what it certifies.
    """
    exit = spec.exit
    if exit.mode == "off" or exit.calibration is None:
        return spec
    path = exit.calibration
    found = Calibration.load(Path(path))
    refuse_sampling(spec)
    if exit.layers == "auto":
        layers = list(found.binding.exit_layers)
        exit = exit.model_copy(update={"layers": layers})
    # Which thresholds a job has changes nothing that it is bound by.
    free = spec.model_copy(update={"exit": exit.model_copy(update={"threshold": 0.0})})
    found.refuse_others(job_binding(free, model), path)
    certified = {"threshold": list(found.thresholds)}
    return spec.model_copy(update={"exit": exit.model_copy(update=certified)})


def certified_delta(spec: JobSpec) -> float | None:
    """The share of differing tokens that a job's exits are certified for; None if they are not.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if spec.exit.mode == "learn":
        return spec.exit.delta
    if spec.exit.mode == "off" or spec.exit.calibration is None:
        return None
    found = Calibration.load(Path(spec.exit.calibration))
    return found.delta if found.risk == "token" else None


def refuse_sampling(spec: JobSpec) -> None:
    """Refuse a job whose tokens are no function of the text alone: nothing certifies those.

    Raises:
        CalibrationError: it samples, or penalises repetition.
    """
    for name, allowed in (("temperature", 0.0), ("repetition_penalty", 1.0)):
        found = getattr(spec.sampling, name)
        if found != allowed:
            raise CalibrationError(
                f"sampling.{name}: found {found}; allowed: {allowed:g}, for greedy generation "
                "alone is certified"
            )


def job_binding(spec: JobSpec, model: ModelConfig) -> Binding:
    """What a calibration of this job holds for.

    Args:
        spec: a job whose layers have been taken from its fitted exits.
        model: its model.

    Raises:
        SpecError: exit layers or prune layer do not fit the model.
        FittedExitsError: its fitted exits cannot be read.
    """
    exit = spec.exit
    exit_layers = resolve_exit_layers(exit, model.num_layers)
    return Binding(
        model_hash=model.content_hash,
        weights_sha256=heads_hash(exit),
        exit_layers=tuple(exit_layers),
        top_k=exit.vocab.top_k,
        prune_layer=resolve_prune_layer(exit, exit_layers),
        proposal=exit.vocab.proposal,
        rank=exit.vocab.rank,
        final_head=exit.vocab.final_head,
        confidence=exit.confidence,
        decay=exit.decay,
        kv=exit.kv,
        max_waiting=exit.max_waiting,
        prefill=exit.prefill,
        dtype=spec.model.dtype,
        max_new_tokens=spec.sampling.max_new_tokens,
    )
