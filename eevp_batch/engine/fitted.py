"""What `fit` makes for a model: exit heads, bridges, a proposal and an adapter, in a folder.

Everything fitted reads the same input, the *unit state* u = h / rms(h) of the state h after an exit
layer: its scale is the same for every token, whatever the model's massive activations are. Knows
tensors and files, nothing of how they are fitted or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

from eevp_batch.engine.adapter import Adapter
from eevp_batch.engine.proposals import LowRankFit
from eevp_batch.engine.sequence import Kind
from eevp_batch.errors import FittedExitsError
from eevp_batch.fitted_config import (
    AFFINE_FORMAT,
    FITTED_MANIFEST,
    MIX_FORMAT,
    MLP_FORMAT,
    read_manifest,
)

MANIFEST, WEIGHTS = FITTED_MANIFEST, "fitted.safetensors"
_ADAPTER = "adapter."
_RIGHT, _MIX, _WHOLE = "proposal.right", "proposal.mix", "proposal.left"


def unit_state(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """The unit state h / rms(h), [N, E] -> [N, E] float32."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True, slots=True)
class Affine:
    """x -> weight x + bias; weight [out, in], bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out] in the type of the rows."""
        return torch.nn.functional.linear(
            rows, self.weight.to(rows.dtype), self.bias.to(rows.dtype)
        )


@dataclass(frozen=True, slots=True)
class MlpHead:
    """x -> affine(x) + down relu(up(x)), an exit head that bends.

    ReLU, because it rounds nothing: a row's result does not depend on its place in a batch.

    Attributes:
        affine: [E, E].
        up: [r, E].
        down: [E, r].
    """

    affine: Affine
    up: Affine
    down: torch.Tensor

    @property
    def width(self) -> int:
        """Hidden units, r."""
        return self.down.shape[1]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, E] -> [N, E] in the type of the rows."""
        bent = self.up(rows).relu()
        return self.affine(rows) + torch.nn.functional.linear(bent, self.down.to(rows.dtype))


ExitHead = Affine | MlpHead


def bridge_input(unit: torch.Tensor, previous: torch.Tensor, lifted: torch.Tensor) -> torch.Tensor:
    """What a bridge with a lift reads: [u; v; relu(lift u)] of [W, E], [W, E] and [W, R]."""
    return torch.cat([unit, previous, lifted.relu()], -1)


@dataclass(frozen=True, slots=True)
class Bridge:
    """Keys and values of the layers behind an exit, from the state that a token left with.

    Attributes:
        layers: by layer number (1-based): [k; v] = weight x + bias of that layer's stacked key and
            value projection, before any key norm and before rotary; [2 * num_kv_heads * D].
        down: [r, in]; x = down z where there is one, else x = z.
        lift: [R, E]; with it z = [u; v; relu(lift u)], in = 2 E + R, where v is the unit state of
            the token before, after the first exit layer, and zeros where a bridged part of a prompt
            begins. Without it z = u. The directions are random (random kitchen sinks, Rahimi and
            Recht 2008), so that what is fitted stays least squares.
    """

    layers: Mapping[int, Affine]
    down: torch.Tensor | None = None
    lift: torch.Tensor | None = None


@dataclass(frozen=True)
class FittedExits:
    """All that is fitted for one model.

    Attributes:
        model_hash: content hash of the model that it belongs to.
        num_layers: L of that model.
        hidden_size: E of that model.
        exit_layers: e_1 < ..., the last layer apart.
        heads: by exit layer, of either kind: the state before the final norm is u + head(u) there;
            zeros are the logit lens.
        bridges: by kind of token and exit layer; `prompt` at the first exit layer only.
        proposal: proposes the ids to keep at the first exit layer.
        shortlist: [C] int32, ascending: ids that the job's outputs use; None: none was made.
        tail: tokens at the end of a prompt that run at full depth even where a prompt is bridged.
        lead: tokens at its beginning that do: what all prompts shared.
        adapter: change of the model's own weights that all of the above was fitted with.
        facts: what made it: data, settings, figures; written as they are.
    """

    model_hash: str
    num_layers: int
    hidden_size: int
    exit_layers: tuple[int, ...]
    heads: Mapping[int, ExitHead] = field(default_factory=dict)
    bridges: Mapping[tuple[Kind, int], Bridge] = field(default_factory=dict)
    proposal: LowRankFit | None = None
    shortlist: torch.Tensor | None = None
    tail: int = 1
    lead: int = 0
    adapter: Adapter | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def shortlist_with(self, always: Collection[int]) -> torch.Tensor | None:
        """The shortlist and the ids that are always kept; None where there is none."""
        if self.shortlist is None:
            return None
        ends = self.shortlist.new_tensor(sorted(always))
        return torch.cat([self.shortlist, ends])

    def save(self, folder: Path) -> None:
        """Write the folder; the manifest comes last and holds the hash of the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = format_safetensors({k: v.contiguous() for k, v in self._tensors().items()})
        (folder / WEIGHTS).write_bytes(weights)
        manifest = {
            "format": self._format,
            "model_hash": self.model_hash,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "exit_layers": list(self.exit_layers),
            "tail": self.tail,
            "lead": self.lead,
            "adapter_rank": None if self.adapter is None else self.adapter.rank,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            **self.facts,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    @property
    def _format(self) -> int:
        """The first one whose readers know all of it."""
        if self.proposal is not None and not self.proposal.is_whole:
            return MIX_FORMAT
        has_mlp = any(isinstance(head, MlpHead) for head in self.heads.values())
        return MLP_FORMAT if has_mlp else AFFINE_FORMAT

    @classmethod
    def load(cls, folder: Path) -> FittedExits:
        """Read a folder.

        Raises:
            FittedExitsError: it is not there, not whole, or not of this format.
        """
        manifest = read_manifest(folder)
        try:
            weights = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise FittedExitsError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
        found = hashlib.sha256(weights).hexdigest()
        if found != manifest["weights_sha256"]:
            raise FittedExitsError(
                f"{folder / WEIGHTS}: found sha256 {found}; allowed: "
                f"{manifest['weights_sha256']}, what {MANIFEST} says"
            )
        try:
            tensors = parse_safetensors(weights)
        except SafetensorError as error:
            raise FittedExitsError(f"{folder / WEIGHTS}: {error}") from error
        try:
            return _assembled(manifest, tensors)
        except KeyError as error:
            raise FittedExitsError(f"{folder / WEIGHTS}: found no tensor {error}") from error

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything by the name that it has in the file."""
        out: dict[str, torch.Tensor] = {}
        for layer, head in self.heads.items():
            out |= _head_tensors(f"heads.{layer}", head)
        for (kind, exit_layer), bridge in self.bridges.items():
            stem = f"bridges.{kind}.{exit_layer}"
            if bridge.down is not None:
                out[f"{stem}.down"] = bridge.down
            if bridge.lift is not None:
                out[f"{stem}.lift"] = bridge.lift.clone()  # safetensors take no memory twice
            for layer, affine in bridge.layers.items():
                out[f"{stem}.{layer}.weight"] = affine.weight
                out[f"{stem}.{layer}.bias"] = affine.bias
        if self.proposal is not None:
            name = _WHOLE if self.proposal.is_whole else _MIX
            out |= {name: self.proposal.mix, _RIGHT: self.proposal.right}
        if self.adapter is not None:
            out |= {f"{_ADAPTER}{name}": part for name, part in self.adapter.tensors().items()}
        if self.shortlist is not None:
            out["shortlist"] = self.shortlist
        return out


def _head_tensors(stem: str, head: ExitHead) -> dict[str, torch.Tensor]:
    """A head by the names that it has in the file; `_head` reads it."""
    if isinstance(head, MlpHead):
        up = {f"{stem}.up.weight": head.up.weight, f"{stem}.up.bias": head.up.bias}
        return _head_tensors(stem, head.affine) | up | {f"{stem}.down": head.down}
    return {f"{stem}.weight": head.weight, f"{stem}.bias": head.bias}


def _head(tensors: dict[str, torch.Tensor], stem: str) -> ExitHead:
    affine = _affine(tensors, stem)
    if f"{stem}.down" not in tensors:
        return affine
    return MlpHead(affine, _affine(tensors, f"{stem}.up"), tensors[f"{stem}.down"])


def _affine(tensors: dict[str, torch.Tensor], stem: str) -> Affine:
    return Affine(tensors[f"{stem}.weight"], tensors[f"{stem}.bias"])


_OWN_FIELDS = (
    "format",
    "model_hash",
    "num_layers",
    "hidden_size",
    "exit_layers",
    "tail",
    "lead",
    "adapter_rank",
    "weights_sha256",
)


def _assembled(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FittedExits:
    """The exits from their files' contents."""
    exit_layers, num_layers = tuple(manifest["exit_layers"]), int(manifest["num_layers"])
    heads = {e: _head(tensors, f"heads.{e}") for e in exit_layers if f"heads.{e}.weight" in tensors}
    kinds: tuple[Kind, ...] = ("generated", "prompt")
    bridges: dict[tuple[Kind, int], Bridge] = {}
    for kind in kinds:
        for e in exit_layers:
            stem = f"bridges.{kind}.{e}"
            if f"{stem}.{num_layers}.weight" in tensors:
                layers = {n: _affine(tensors, f"{stem}.{n}") for n in range(e + 1, num_layers + 1)}
                down, lift = tensors.get(f"{stem}.down"), tensors.get(f"{stem}.lift")
                bridges[kind, e] = Bridge(layers, down, lift)
    proposal = None
    if _RIGHT in tensors:
        is_whole = _WHOLE in tensors
        proposal = LowRankFit(tensors[_RIGHT], tensors[_WHOLE if is_whole else _MIX], is_whole)
    changes = {
        name.removeprefix(_ADAPTER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_ADAPTER)
    }
    adapter = Adapter.of_tensors(changes) if changes else None
    rank = None if adapter is None else adapter.rank
    if rank != manifest["adapter_rank"]:
        raise FittedExitsError(
            f"{WEIGHTS}: found an adapter of rank {rank}; allowed: {manifest['adapter_rank']}, "
            f"what {MANIFEST} says"
        )
    return FittedExits(
        model_hash=manifest["model_hash"],
        num_layers=num_layers,
        hidden_size=int(manifest["hidden_size"]),
        exit_layers=exit_layers,
        heads=heads,
        bridges=bridges,
        proposal=proposal,
        shortlist=tensors.get("shortlist"),
        tail=int(manifest["tail"]),
        lead=int(manifest["lead"]),
        adapter=adapter,
        facts={name: value for name, value in manifest.items() if name not in _OWN_FIELDS},
    )
