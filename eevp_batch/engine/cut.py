"""A loaded model as a job uses it: cut at its exits, with what was fitted for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from eevp_batch.engine.adapter import is_merged, merge
from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.devices import Device
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.limits import resolve_limits
from eevp_batch.engine.placed_model import place_model
from eevp_batch.engine.proposals import Proposal, make_proposal
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind, ShortPrompt
from eevp_batch.errors import FittedExitsError
from eevp_batch.fitted_config import has_adapter
from eevp_batch.model_config import resolve_exit_layers, resolve_prune_layer
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec


@dataclass(frozen=True, slots=True)
class CutModel:
    """A model cut for a job, from which engines are made that differ in their thresholds.

    Attributes:
        model: cut at the exit layers, its fitted exits in use.
        prune_layer: the exit layer that cuts the vocabulary; None: no pruning.
        proposal: proposes the ids to keep; None: the head itself.
        short_prompt: how much of a prompt runs no further than the first exit; None: nothing.
        end_ids: ids that end a generation.
        context_length: most positions.
        is_adapted: whether its weights are no longer the original's.
    """

    model: SegmentedModel
    prune_layer: int | None
    proposal: Proposal | None
    short_prompt: ShortPrompt | None
    end_ids: frozenset[int]
    context_length: int
    is_adapted: bool = False

    def whole(self, original: SegmentedModel | None = None) -> CutModel:
        """The model without exits, and without its adapter.

        Args:
            original: the model as it was, cut anywhere; where `is_adapted` only it will do.

        Raises:
            FittedExitsError: the model is adapted, and the original is not given.
        """
        if self.is_adapted and original is None:
            raise FittedExitsError(
                "exit.heads: found an adapter; allowed at full depth: the model without it, which "
                "has to be loaded besides"
            )
        model = (original or self.model).recut([self.model.num_layers])
        none = {"prune_layer": None, "proposal": None, "short_prompt": None, "is_adapted": False}
        return replace(self, model=model, **none)  # type: ignore[arg-type]

    def engine(
        self, tokenizer: Any, exit: ExitSpec, sampling: SamplingSpec, engine: EngineSpec
    ) -> Engine:
        """An engine around the model, which is not copied.

        Raises:
            UsageError: the settings do not fit the device.
        """
        return Engine(
            model=self.model,
            tokenizer=tokenizer,
            exits=exit,
            sampling=sampling,
            prune_layer=self.prune_layer,
            end_ids=self.end_ids,
            limits=resolve_limits(engine, self.model, self.context_length),
            proposal=self.proposal,
            short_prompt=self.short_prompt,
        )


def cut_model(
    weights: PreTrainedModel,
    tokenizer: Any,
    exit: ExitSpec,
    fitted: FittedExits | None = None,
    kernel: Kernel | None = None,
    cut: SegmentedModel | None = None,
    devices: Sequence[Device] = (),
    kv_memory: int | Literal["auto"] = "auto",
) -> CutModel:
    """Cut a loaded model as a job asks for, and let it use its fitted exits.

    An adapter of theirs is merged into the weights; from a `cut` it has to be in there already.

    Args:
        weights: a `...ForCausalLM`; from now on its attention is this package's.
        tokenizer: its tokenizer.
        exit: exits; layers are resolved against the model.
        fitted: exit heads, bridges and proposal; None: those of the folder that `exit` names.
        kernel: lets the model's own modules run, with this attention; None: what is fastest.
        cut: the model of another engine around the same weights; its layers are shared.
        devices: where it runs, see `place_model`; none: where the model is.
        kv_memory: bytes that keys and values may have, or what is free.

    Raises:
        UsageError: the settings do not fit the model or the devices.
    """
    fitted = fitted or _fitted_of(exit)
    if fitted is not None and fitted.adapter is not None:
        if cut is not None and not is_merged(weights, fitted.adapter):
            raise FittedExitsError(
                "exit.heads: found an adapter that the model was laid out without; allowed: to "
                "merge it first"
            )
        merge(weights, fitted.adapter)
    config = weights.config
    exit_layers = resolve_exit_layers(exit, config.num_hidden_layers)
    prune_layer = resolve_prune_layer(exit, exit_layers)
    ends = end_ids(weights, tokenizer)
    factors = shortlist = None
    if fitted is not None and prune_layer == fitted.exit_layers[0]:
        factors, shortlist = fitted.proposal, fitted.shortlist_with(ends)
    # Before the model is cut.
    proposal = make_proposal(weights, exit.vocab, prune_layer, factors, shortlist)
    if cut is not None:
        model = cut.recut(exit_layers)
    elif devices:
        model = place_model(
            weights, exit_layers, devices, None if kv_memory == "auto" else kv_memory
        )
    else:
        model = SegmentedModel(weights, exit_layers, kernel)
    short_prompt = None
    if fitted is not None:
        model.use(_checked(fitted, exit, exit_layers))
        if exit.prefill == "bridge":
            short_prompt = ShortPrompt(exit_layers[0], fitted.tail, fitted.lead)
    return CutModel(
        model=model,
        prune_layer=prune_layer,
        proposal=proposal,
        short_prompt=short_prompt,
        end_ids=ends,
        context_length=config.max_position_embeddings,
        is_adapted=fitted is not None and fitted.adapter is not None,
    )


def merge_adapter(weights: PreTrainedModel, exit: ExitSpec) -> None:
    """Merge the adapter of the fitted exits that a job names into its model, if there is one.

    `cut_model` does it too; whoever lays the model out before has to come first.

    Raises:
        FittedExitsError: they cannot be read, or the adapter is of another model.
    """
    fitted = _fitted_of(exit) if has_adapter(exit) else None  # which reads the manifest alone
    if fitted is not None and fitted.adapter is not None:
        merge(weights, fitted.adapter)


def _fitted_of(exit: ExitSpec) -> FittedExits | None:
    """The fitted exits that a job names."""
    if exit.mode != "on" or exit.heads is None:
        return None
    return FittedExits.load(Path(exit.heads))


def _checked(fitted: FittedExits, exit: ExitSpec, exit_layers: list[int]) -> FittedExits:
    """The fitted exits as this job may use them: no bridges under another KV policy.

    Raises:
        FittedExitsError: there are none for one of the exit layers.
    """
    early = tuple(exit_layers[:-1])
    if early != fitted.exit_layers:
        raise FittedExitsError(
            f"exit.layers: found {list(early)}; allowed: {list(fitted.exit_layers)}, what "
            "exit.heads was fitted for"
        )
    if exit.kv != "bridge":
        return replace(fitted, bridges={})
    needed: list[tuple[Kind, int]] = [("generated", layer) for layer in early]
    if exit.prefill == "bridge":
        needed.append(("prompt", early[0]))
    for kind, layer in needed:
        if (kind, layer) not in fitted.bridges:
            raise FittedExitsError(
                f"exit.heads: found no bridge for {kind} tokens at layer {layer}; allowed: a "
                "folder with one, for exit.kv or exit.prefill is bridge"
            )
    return fitted


def end_ids(weights: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Ids that end a generation: of the generation config, else the config, else the tokenizer."""
    generation = getattr(weights, "generation_config", None)
    for source in (generation, weights.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
