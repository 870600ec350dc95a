"""The file that `calibrate` writes: thresholds, what was certified of them, and for what exactly.

A certificate speaks of one model run in one way. Everything that could change a token's confidence,
its keys and values or its full-depth id stands in the `Binding`; a job whose binding differs is
refused. Knows no tensors; who computes a job's binding hashes its model and fitted exits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from eevp_batch.errors import CalibrationError
from eevp_batch.spec import (
    Confidence,
    Count,
    DecaySpec,
    Dtype,
    KvPolicy,
    Proposing,
    PValueKind,
    Text,
    refused,
)

RiskKind = Literal["token", "sequence"]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# What a user knows each field of a binding by: the job file's name, or the file that it is from.
BINDING_NAMES = {
    "model_hash": "model.content_hash",
    "weights_sha256": "exit.heads.weights_sha256",
    "exit_layers": "exit.layers",
    "top_k": "exit.vocab.top_k",
    "prune_layer": "exit.vocab.prune_layer",
    "proposal": "exit.vocab.proposal",
    "rank": "exit.vocab.rank",
    "final_head": "exit.vocab.final_head",
    "confidence": "exit.confidence",
    "decay": "exit.decay",
    "kv": "exit.kv",
    "max_waiting": "exit.max_waiting",
    "prefill": "exit.prefill",
    "dtype": "model.dtype",
    "max_new_tokens": "sampling.max_new_tokens",
}
_OF_PRUNING = {"prune_layer", "proposal", "rank", "final_head"}


class Mismatch(NamedTuple):
    """One field in which a job differs from what was certified, values as in the file."""

    field: str
    certified: Any
    found: Any


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Binding(_Part):
    """What a calibration holds for.

    Attributes:
        model_hash: `ModelConfig.content_hash`.
        weights_sha256: of the fitted exits' weights; None without fitted exits.
        exit_layers: layers after which a token may leave, the last layer of the model included.
        top_k: ids kept per token; None where the vocabulary is not cut, and then what else is said
            of pruning does not matter.
        prune_layer: where it is cut, as a layer.
        rank: of a low-rank proposal; None where there is none, or where it comes fitted.
        max_waiting: matters where `kv` lets tokens wait: recompute and verify.
        max_new_tokens: a row's loss is over all its tokens, and `decay` counts by it.
    """

    model_hash: Hash
    weights_sha256: Hash | None
    exit_layers: Annotated[tuple[Count, ...], Field(min_length=1)]
    top_k: Count | None
    prune_layer: Count | None
    proposal: Proposing
    rank: Count | None = None
    final_head: Literal["full", "pruned"]
    confidence: Confidence
    decay: DecaySpec | None
    kv: KvPolicy
    max_waiting: Count
    prefill: Literal["full", "bridge"]
    dtype: Dtype
    max_new_tokens: Count

    def meaning(self) -> dict[str, Any]:
        """The fields that change what the engine does, as JSON values."""
        values = self.model_dump(mode="json")
        if self.top_k is None:
            values |= dict.fromkeys(_OF_PRUNING)
        if self.kv not in ("recompute", "verify"):
            values["max_waiting"] = None
        return values


class Calibration(_Part):
    """Thresholds with a certificate: P(risk > delta) <= epsilon over the choice of the rows.

    Attributes:
        created: when, with a time zone.
        delta: bound on the risk, a mean over rows.
        epsilon: probability with which the risk may be above delta.
        p_value_kind: how `p_value` was computed.
        num_rows: calibration rows.
        risk: `token`: a row's share of tokens that differ from full depth; `sequence`: a distance
            of its whole output.
        metric: of `sequence`: name of the distance, or of the user's function.
        thresholds: one per exit layer before the last.
        observed_risk: mean loss of the calibration rows.
        p_value: against H0: risk > delta; at most epsilon.
        exit_share: predicted share of tokens that leave before the last layer.
        mean_layer: predicted mean number of layers per token.
        binding: what all this holds for.
        facts: what else is worth keeping, such as the data; never compared.
    """

    format: Literal[1] = 1
    created: AwareDatetime
    delta: OpenShare
    epsilon: OpenShare
    p_value_kind: PValueKind
    num_rows: Count
    risk: RiskKind
    metric: Text | None = None
    thresholds: tuple[Annotated[float, Field(ge=0)], ...]
    observed_risk: Share
    p_value: Share
    exit_share: Share
    mean_layer: Annotated[float, Field(gt=0)]
    binding: Binding
    facts: dict[str, Any] = {}

    @model_validator(mode="after")
    def _says_what_it_certifies(self) -> Calibration:
        early = len(self.binding.exit_layers) - 1
        if len(self.thresholds) != early:
            raise refused(
                "thresholds", len(self.thresholds), f"{early}, one per exit before the last"
            )
        if self.p_value > self.epsilon:
            raise refused("p_value", self.p_value, f"at most epsilon, {self.epsilon}")
        if (self.metric is not None) != (self.risk == "sequence"):
            raise refused("metric", self.metric, "a name where risk is sequence, else null")
        return self

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file.

        Raises:
            CalibrationError: it cannot be read, is damaged, or is of another format.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read: {error}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Calibration:
        """The inverse of `to_json`.

        Args:
            text: JSON.
            where: names its origin in errors.

        Raises:
            CalibrationError: the text is damaged or of another format.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            message = f"{field}: {first['msg']}" if field else first["msg"]
            raise CalibrationError(f"{where}: {message}") from error

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)

    def to_json(self) -> str:
        """JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    def mismatches(self, binding: Binding) -> list[Mismatch]:
        """The fields in which a job differs from what was certified, by their names in a job."""
        certified, found = self.binding.meaning(), binding.meaning()
        return [
            Mismatch(name, certified[field], found[field])
            for field, name in BINDING_NAMES.items()
            if certified[field] != found[field]
        ]

    def refuse_others(self, binding: Binding, where: str) -> None:
        """Refuse a job that is not the certified one.

        Args:
            binding: what the job would run.
            where: names this calibration in the error.

        Raises:
            CalibrationError: a field differs; all that do are named.
        """
        differing = self.mismatches(binding)
        if differing:
            lines = [f"  {field}: certified {a!r}, found {b!r}" for field, a, b in differing]
            raise CalibrationError(
                f"{where} certifies something else:\n" + "\n".join(lines) + "\n"
                "Calibrate again, or put the fields back."
            )
