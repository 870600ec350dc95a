"""What a job's output depends on, as flat named fields, and the hash of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from eevp_batch.fitted_config import heads_hash
from eevp_batch.model_config import ModelConfig, resolve_exit_layers, resolve_prune_layer
from eevp_batch.spec import AuditSpec, JobSpec
from eevp_batch.storage.scan import InputFile

_OF_LEARN = ("exit.delta", "exit.epsilon", "exit.learn_rows", "exit.learn_gain")
_UNUSED_BY_LEARN = ("exit.threshold",)


def fingerprint_fields(
    spec: JobSpec,
    model: ModelConfig,
    format_version: int,
    files: Sequence[InputFile],
    kept_columns: Sequence[str],
) -> dict[str, Any]:
    """Every setting and input fact that changes the output, by the dotted name of the job file.

    How many replicas run, how large their batches are and how parts are compressed is left out: a
    job may be resumed on another machine.
    """
    input_fields = _flat("input", spec.input.model_dump(mode="json"))
    del input_fields["input.path"]
    exit_fields = _flat("exit", spec.exit.model_dump(mode="json"))
    del exit_fields["exit.calibration"]  # what it certified stands in exit.threshold
    for name in _UNUSED_BY_LEARN if spec.exit.mode == "learn" else _OF_LEARN:
        del exit_fields[name]
    exit_layers = resolve_exit_layers(spec.exit, model.num_layers)
    return {
        "format_version": format_version,
        **input_fields,
        "input.keep_columns": list(kept_columns),
        **{
            f"input.path[{file.path}]": f"{file.num_rows} rows, footer {file.footer_hash}"
            for file in files
        },
        **_flat("prompt", spec.prompt.model_dump(mode="json")),
        "model.content_hash": model.content_hash,
        "model.dtype": spec.model.dtype,
        **exit_fields,
        "exit.heads": heads_hash(spec.exit),
        "exit.layers": exit_layers,
        "exit.vocab.prune_layer": resolve_prune_layer(spec.exit, exit_layers),
        **_flat("sampling", spec.sampling.model_dump(mode="json")),
        "run.chunk_rows": spec.run.chunk_rows,
        "output.token_stats": spec.output.token_stats,
        **_audit_fields(spec.audit),
    }


def _audit_fields(audit: AuditSpec) -> dict[str, Any]:
    """Nothing without an audit; the bound counts where it may stop exits."""
    if not audit.full_depth_fraction:
        return {}
    fields = _flat("audit", audit.model_dump(mode="json"))
    return fields if audit.stop_exits else fields | {"audit.delta": None}


def fingerprint_of(fields: dict[str, Any]) -> str:
    """Hex sha256 of the fields, independent of their order."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}.{name}", value)
        else:
            flat[f"{prefix}.{name}"] = value
    return flat
