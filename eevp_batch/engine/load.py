"""From a model folder to an engine: tokenizer, weights, end ids, limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.devices import Device, replica_devices
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.host_memory import keep_freed_memory, let_freed_memory_go
from eevp_batch.engine.placed_model import place_model
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.stored_weights import skeleton
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.errors import ModelError
from eevp_batch.fitted_config import with_fitted
from eevp_batch.model_config import (
    ModelConfig,
    prompt_room,
    read_model_config,
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
        exits: exits; like the others, what a job file that says nothing would have. Layers and
            thresholds that they leave to `heads` and `calibration` are taken from there.
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
    exits = _with_fitted(exits or ExitSpec(), sampling, spec, model)
    tokenizer = load_tokenizer(model, spec)
    room = prompt_room(sampling, model)
    encoder = PromptEncoder(tokenizer, prompt or PromptSpec(), None, room)
    engine = build_engine(
        load_weights(spec, model), tokenizer, exits, sampling, limits or EngineSpec()
    )
    engine.encode = lambda text: encoder.encode({"prompt": text})
    return engine


def _with_fitted(
    exits: ExitSpec, sampling: SamplingSpec, model: ModelSpec, config: ModelConfig
) -> ExitSpec:
    """Exits as a job would have them that read and wrote nothing; see `with_fitted`."""
    nowhere = {"path": model.path}
    job = {"version": 1, "input": nowhere, "output": nowhere, "model": model.model_dump()}
    spec = JobSpec.model_validate(job)
    spec = spec.model_copy(update={"exit": exits, "sampling": sampling})
    return with_fitted(spec, config).exit


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


def original_model(
    spec: JobSpec, model: ModelConfig, devices: Sequence[Device] = ()
) -> SegmentedModel:
    """A job's model as it was before any adapter, beside the one that the job runs.

    Args:
        spec: the job.
        model: what `read_model_config` said of its model.
        devices: where it runs, see `place_model`; none: where a model is put.

    Raises:
        UsageError: it cannot be loaded, or does not fit the devices.
    """
    weights = load_weights(spec.model, model, devices[0].at if devices else None)
    if devices:
        return place_model(weights, [model.num_layers], devices)
    return SegmentedModel(weights, [model.num_layers])


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
    let_freed_memory_go()
    return found.engine(tokenizer, exit, sampling, engine)
