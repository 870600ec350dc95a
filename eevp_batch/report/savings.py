"""What the exits saved of layers, operations and seconds, estimated beside a full-depth run.

Operations are those of the matrix products, attention left out, as in `forecast`. Seconds are taken
to go with operations: only a run with `exit.mode: off` measures them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eevp_batch.model_config import ModelConfig
from eevp_batch.records import Phase
from eevp_batch.report.forecast import flops_by_exit

_RUN_LATER = ("recompute", "verify")


@dataclass(frozen=True, slots=True)
class Savings:
    """A job beside one that runs every token through all layers.

    Attributes:
        layers_run, layers_full: (generated tokens x layers) before the exits, and in all.
        flops_run, flops_full: of prompts and generated tokens; None where not estimated.
        working_s: seconds in which replicas worked, over all runs; None where not known.
        missing: why operations are not estimated; None where they are.
    """

    layers_run: int
    layers_full: int
    flops_run: float | None
    flops_full: float | None
    working_s: float | None
    missing: str | None

    @property
    def seconds_saved(self) -> float | None:
        """Negative where the checks cost more than the exits save; None where not estimated."""
        if self.working_s is None or not self.flops_run or self.flops_full is None:
            return None
        return self.working_s * (self.flops_full / self.flops_run - 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "seconds_saved": self.seconds_saved}


def savings(
    fields: Mapping[str, Any],
    exit_layers: list[int],
    tokens: Mapping[Phase, Counter[int]],
    prompt_tokens: int,
    model: ModelConfig | None,
    working_s: float | None,
) -> Savings:
    """Compare a job with full depth.

    Args:
        fields: `Plan.fields`.
        exit_layers: layers after which tokens left, the last one among them.
        tokens: generated tokens by exit layer, by how their chunk ran.
        prompt_tokens: over all generations.
        model: its shape; None where the model is not at hand.
        working_s: as in `Savings`.
    """
    total = sum(tokens.values(), start=Counter[int]())
    layers_run = sum(layer * count for layer, count in total.items())
    layers_full = exit_layers[-1] * total.total()
    missing = _missing(fields, model)
    if missing is not None or model is None:
        return Savings(layers_run, layers_full, None, None, working_s, missing)
    vocab = {name: fields[f"exit.vocab.{name}"] for name in ("top_k", "final_head")}
    early = exit_layers[:-1]
    prune_layer = None
    if vocab["top_k"] is not None and early:
        prune_layer = fields["exit.vocab.prune_layer"] or early[0]
    ends_full = vocab["final_head"] == "full"
    by_exit = flops_by_exit(model, exit_layers, prune_layer, vocab["top_k"], ends_full)
    whole = 2 * (model.num_layers * model.layer_weights + model.head_weights)
    prompts = 2.0 * model.num_layers * model.layer_weights * prompt_tokens
    shallow = prompts
    if fields.get("exit.prefill") == "bridge" and early:
        project = 2 * model.num_kv_heads * model.head_size * model.hidden_size
        skipped = model.num_layers - early[0]
        shallow = 2.0 * (early[0] * model.layer_weights + skipped * project) * prompt_tokens
    run = shallow + sum(by_exit[layer] * n for layer, n in tokens.get("exits", Counter()).items())
    run += whole * tokens.get("full", Counter[int]()).total()
    return Savings(
        layers_run, layers_full, run, prompts + whole * total.total(), working_s, missing
    )


def _missing(fields: Mapping[str, Any], model: ModelConfig | None) -> str | None:
    if fields["exit.kv"] in _RUN_LATER and fields["exit.mode"] != "off":
        return (
            f"not estimated: with exit.kv: {fields['exit.kv']} the skipped layers are run later, "
            "several tokens at a time; that saves reads of weights, not operations"
        )
    if model is None:
        return "not estimated: the model's config.json is not at hand any more, or has changed"
    return None
