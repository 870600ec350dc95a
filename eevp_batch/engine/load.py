"""From a model folder to an engine: tokenizer, weights, end ids, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.devices import Device, replica_devices
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.host_memory import keep_freed_memory
from eevp_batch.engine.limits import resolve_limits
from eevp_batch.engine.placed_model import place_model
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.proposals import Proposal, make_proposal
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind, ShortPrompt
from eevp_batch.engine.stored_weights import skeleton
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.errors import FittedExitsError, ModelError
from eevp_batch.model_config import (
    ModelConfig,
    prompt_room,
    read_model_config,
    resolve_exit_layers,
    resolve_prune_layer,
)
from eevp_batch.spec import EngineSpec, ExitSpec, JobSpec, ModelSpec, PromptSpec, SamplingSpec


class Loaded(NamedTuple):
    """A job's model, what turns rows into its tokens, and where it is to run."""

    weights: PreTrainedModel
    tokenizer: Any
    encoder: PromptEncoder
    devices: Sequence[Device]


def load_engine(
    spec: JobSpec,
    model: ModelConfig,
    num_threads: int | None = None,
    num_gpus: float | None = None,
) -> tuple[Engine, PromptEncoder]:
    """The engine and the prompt encoder of a job; see `load_job_model`."""
    weights, tokenizer, encoder, devices = load_job_model(spec, model, num_threads, num_gpus)
    engine = build_engine(
        weights, tokenizer, spec.exit, spec.sampling, spec.engine, devices=devices
    )
    return engine, encoder


def load_job_model(
    spec: JobSpec,
    model: ModelConfig,
    num_threads: int | None = None,
    num_gpus: float | None = None,
) -> Loaded:
    """Read a job's tokenizer; its model, as far as that is not left to whoever cuts it.

    Args:
        spec: the job.
        model: what `read_model_config` said of its model.
        num_threads: CPU threads for torch; None leaves them alone.
        num_gpus: GPUs to use; None: one, where there is any.

    Raises:
        UsageError: the job's settings do not fit the model, or there are too few GPUs.
    """
    devices = replica_devices(num_gpus)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    tokenizer = load_tokenizer(model, spec.model)
    room = prompt_room(spec.sampling, model)
    encoder = PromptEncoder(tokenizer, spec.prompt, spec.input, room)
    weights = load_weights(spec.model, model, devices[0].at)
    return Loaded(weights, tokenizer, encoder, devices)


def load(
    path: str,
    exits: ExitSpec | None = None,
    sampling: SamplingSpec | None = None,
    limits: EngineSpec | None = None,
    prompt: PromptSpec | None = None,
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
) -> Engine:
    """An engine for use as a library; it takes strings as well as `Prompt`s.

    Args:
        path: local model folder or hub id.
        exits: exits; like the others, what a job file that says nothing would have.
        sampling: how tokens are chosen and when a generation ends.
        limits: batch and memory.
        prompt: chat template and length of string prompts.
        dtype: number type of weights and activations.

    Raises:
        UsageError: the settings do not fit the model, or it cannot be used.
    """
    spec = ModelSpec(path=path, dtype=dtype)
    sampling = sampling or SamplingSpec()
    model = read_model_config(spec)
    tokenizer = load_tokenizer(model, spec)
    room = prompt_room(sampling, model)
    encoder = PromptEncoder(tokenizer, prompt or PromptSpec(), None, room)
    engine = build_engine(
        load_weights(spec, model), tokenizer, exits or ExitSpec(), sampling, limits or EngineSpec()
    )
    engine.encode = lambda text: encoder.encode({"prompt": text})
    return engine


def load_weights(
    spec: ModelSpec, model: ModelConfig, device: torch.device | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, its weights still in their safetensors files.

    Whoever cuts it reads them, each straight to its device; where they have to be read as a whole,
    they are on the device already.

    Args:
        spec: number type, and whether the model brings code.
        model: what `read_model_config` said of it.
        device: where it computes; None: a GPU, where there is any.

    Raises:
        ModelError: the files do not hold what the configuration promises.
    """
    device = device or replica_devices(None)[0].at
    try:
        if not spec.trust_remote_code:
            stored = skeleton(model.path, getattr(torch, spec.dtype), device)
            if stored is not None:
                return stored
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{model.path}: weights cannot be loaded: {error}") from error
    loaded.to(device).eval()  # type: ignore[arg-type]
    return loaded


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
    """

    model: SegmentedModel
    prune_layer: int | None
    proposal: Proposal | None
    short_prompt: ShortPrompt | None
    end_ids: frozenset[int]
    context_length: int

    @property
    def whole(self) -> CutModel:
        """The same model without exits."""
        model = self.model.recut([self.model.num_layers])
        return replace(self, model=model, prune_layer=None, proposal=None, short_prompt=None)

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


def build_engine(
    weights: PreTrainedModel,
    tokenizer: Any,
    exit: ExitSpec,
    sampling: SamplingSpec,
    engine: EngineSpec,
    fitted: FittedExits | None = None,
    kernel: Kernel | None = None,
    cut: SegmentedModel | None = None,
    devices: Sequence[Device] = (),
) -> Engine:
    """An engine around a loaded model.

    Args:
        weights: a `...ForCausalLM`; from now on its attention is this package's.
        tokenizer: its tokenizer.
        exit: exits; layers are resolved against the model.
        sampling: sampling.
        engine: batch and memory.
        fitted: exit heads, bridges and proposal; None: those of the folder that `exit` names.
        kernel: lets the model's own modules run, with this attention; None: what is fastest.
        cut: the model of another engine around the same weights; its layers are shared.
        devices: where it runs, see `place_model`; none: where the model is.

    Raises:
        UsageError: the settings do not fit the model or the devices.
    """
    keep_freed_memory()
    found = cut_model(weights, tokenizer, exit, fitted, kernel, cut, devices, engine.kv_memory)
    return found.engine(tokenizer, exit, sampling, engine)


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
    if fitted is None and exit.mode == "on" and exit.heads is not None:
        fitted = FittedExits.load(Path(exit.heads))
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
    )


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
