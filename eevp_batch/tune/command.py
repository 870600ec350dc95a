"""What `potential` and `fit` do on the command line: load, generate at full depth, look, fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import ExitHead, FittedExits
from eevp_batch.engine.load import load_job_model, load_weights
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.errors import FittedExitsError, UsageError
from eevp_batch.fitted_config import read_manifest, refuse_sampling
from eevp_batch.model_config import ModelConfig, prompt_room, read_model_config
from eevp_batch.spec import (
    Dtype,
    EngineSpec,
    ExitSpec,
    InputSpec,
    JobSpec,
    ModelSpec,
    PromptSpec,
    SamplingSpec,
)
from eevp_batch.tune import adapter_checkpoint
from eevp_batch.tune.adapted_fit import Adapting, fit_adapted
from eevp_batch.tune.adapter_training import AdapterSettings
from eevp_batch.tune.choose import choose_exits
from eevp_batch.tune.costs import for_job, measured_costs
from eevp_batch.tune.fit import FitSettings, OnProgress, fit_exits, split_rows
from eevp_batch.tune.head_training import HeadSettings, usual_mlp_width
from eevp_batch.tune.outputs import (
    data_facts,
    full_depth_engine,
    full_depth_rows,
    generate_rows,
)
from eevp_batch.tune.potential import measure_potential
from eevp_batch.tune.sample import sample_prompts
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row
from eevp_batch.tune.survey import quick_heads as fit_quick_heads

PROPOSAL_RANK = 128
"""What a fitted job is taken to use; a raw one pays more."""

Say = Callable[[str], None]
"""Takes one line about what is going on."""


@dataclass(frozen=True, slots=True)
class Source:
    """Which prompts a model is looked at with.

    Attributes:
        model: local folder or hub id.
        prompts: Parquet file, folder, glob or URI.
        column: of the prompts.
        rows: how many to generate for.
        max_new_tokens: of each generation.
        stop: strings that end one.
        dtype: number type of weights and activations.
    """

    model: str
    prompts: str
    column: str
    rows: int
    max_new_tokens: int
    stop: Sequence[str]
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class Outputs:
    """A model, cut at its last layer, and what it generated."""

    config: ModelConfig
    model: SegmentedModel
    rows: Sequence[Row]


def full_depth_outputs(source: Source, say: Say) -> Outputs:
    """Load the model and generate.

    Raises:
        UsageError: something cannot be read, or does not belong together.
    """
    spec = ModelSpec(path=source.model, dtype=source.dtype)
    config = read_model_config(spec)
    tokenizer = load_tokenizer(config, spec)
    sampling = SamplingSpec(max_new_tokens=source.max_new_tokens, stop=list(source.stop))
    columns = InputSpec(path=source.prompts, prompt_column=source.column)
    encoder = PromptEncoder(tokenizer, PromptSpec(), columns, prompt_room(sampling, config))
    prompts = sample_prompts(source.prompts, encoder, source.rows)
    weights = load_weights(spec, config)
    model = SegmentedModel(weights, [config.num_layers])
    engine = full_depth_engine(weights, model, tokenizer, sampling, EngineSpec())
    say(f"generating for {len(prompts)} prompts at full depth")
    return Outputs(config, model, generate_rows(engine, prompts))


def run_potential(
    source: Source, *, target: float, heads: str | None, quick_heads: bool, say: Say
) -> dict[str, Any]:
    """Measure what exits could do; see `measure_potential`.

    Args:
        source: model and prompts.
        target: share of all tokens that has to stay as at full depth.
        heads: folder of fitted exits.
        quick_heads: whether closed-form heads are fitted to half of the rows.
        say: progress.

    Raises:
        UsageError: something cannot be read, or does not belong together.
    """
    lenses: dict[str, Mapping[int, ExitHead]] = {"raw": {}}
    if heads is not None:
        model_hash = read_model_config(ModelSpec(path=source.model)).content_hash
        lenses["fitted"] = _heads_of(heads, model_hash)
    found = full_depth_outputs(source, say)
    rows, num_layers = found.rows, found.config.num_layers
    if quick_heads:
        fitting, rows = split_rows(rows, 0.5, seed=0)
        say(f"fitting closed-form heads to {len(fitting)} of them")
        parts = split_rows(fitting, 0.2, seed=0)
        lenses["quick"] = fit_quick_heads(found.model, *parts, range(1, num_layers))
    say(f"looking at {len(rows)} rows after each of {num_layers} layers")
    costs = Costs.counted(found.config, proposal_rank=PROPOSAL_RANK)
    costs = for_job(costs, ExitSpec(), rows)
    return measure_potential(found.model, rows, lenses, costs, target).to_json()


def _heads_of(folder: str, model_hash: str) -> Mapping[int, ExitHead]:
    """The heads of a folder of fitted exits.

    Raises:
        FittedExitsError: they are of another model, or of an adapted one.
    """
    fitted = FittedExits.load(Path(folder))
    if fitted.adapter is not None:
        raise FittedExitsError(
            f"{folder}: found an adapter; allowed: exits of the model as it is, which is what is "
            "looked at"
        )
    if fitted.model_hash != model_hash:
        raise FittedExitsError(
            f"{folder}: model: found {fitted.model_hash[:12]}; allowed: {model_hash[:12]}, "
            "that of the model"
        )
    return fitted.heads


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How exits are fitted for a job.

    Attributes:
        rows: how many rows are drawn from the job's input.
        source: a finished full-depth output of the same job to draw from; None: rows are generated.
        layers: exit layers, the last layer apart; none: they are searched.
        target: share of all tokens that has to stay as at full depth, for the search.
        bridge_rank: of the bridges; None: two thirds of the model's width.
        proposal_rank: of the low-rank proposal.
        shortlist: ids of the shortlist.
        tail: prompt tokens at the end that run at full depth where prompts are bridged.
        seed: of the choice of rows.
        head: kind of the exit heads, `affine` or `mlp`.
        head_width: hidden units of an MLP; None: a quarter of the model's width.
        adapter_rank: of an adapter that is trained first; None: the model stays as it is.
        adapter_steps: of its training; None: as many as `adapter_minutes` are enough for.
        adapter_minutes: of its training.
    """

    rows: int
    source: str | None
    layers: Sequence[int]
    target: float
    bridge_rank: int | None
    proposal_rank: int
    shortlist: int
    tail: int
    seed: int
    head: Literal["affine", "mlp"] = "affine"
    head_width: int | None = None
    adapter_rank: int | None = None
    adapter_steps: int | None = None
    adapter_minutes: float = 8.0

    def mlp_width(self, width: int) -> int | None:
        """Hidden units of the heads' MLPs on a model of a width; None: heads are affine."""
        if self.head == "affine":
            return None
        return self.head_width or usual_mlp_width(width)


def run_fit(
    spec: JobSpec,
    config: ModelConfig,
    fields: Mapping[str, Any],
    folder: str,
    options: FitOptions,
    say: Say,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Fit exits to what a job's model generates for its own prompts, and write them.

    Args:
        spec: the job, at full depth.
        config: its model.
        fields: of its plan, by dotted name.
        folder: where they go.
        options: how.
        say: what is going on.
        on_progress: how far it is.

    Returns:
        The manifest.

    Raises:
        UsageError: something cannot be read, or no exit is worth taking.
    """
    refuse_sampling(spec)
    training = _training(spec, options)
    weights, tokenizer, encoder, devices = load_job_model(spec, config)
    model = SegmentedModel(weights, [config.num_layers])

    def engine() -> Engine:
        return full_depth_engine(weights, model, tokenizer, spec.sampling, spec.engine)

    draw = (options.source, options.rows, options.seed)
    rows = full_depth_rows(spec, fields, encoder, engine, say, *draw)
    facts: dict[str, Any] = {
        **data_facts(spec, options.source, options.seed, Path(folder)),
        "sampling": spec.sampling.model_dump(mode="json"),
        "dtype": spec.model.dtype,
    }
    layers = sorted(options.layers)
    if not layers:
        layers, facts["search"] = _searched(model, rows, spec, options, say)
    settings = FitSettings(
        layers,
        prompt_bridge=spec.exit.prefill == "bridge",
        bridge_rank=options.bridge_rank,
        proposal_rank=options.proposal_rank,
        shortlist=options.shortlist,
        tail=options.tail,
        heads=HeadSettings(mlp_width=options.mlp_width(config.hidden_size)),
        seed=options.seed,
    )
    job = (model, config.content_hash, rows, settings)
    if training is None:
        fitted = fit_exits(*job, facts, on_progress)
    else:
        load = partial(load_weights, spec.model, config, devices[0].at)
        adapting = Adapting(training, load, Path(folder))
        fitted = fit_adapted(*job, adapting, facts, on_progress)
    fitted.save(Path(folder))
    adapter_checkpoint.remove(Path(folder))
    return read_manifest(Path(folder))


def _training(spec: JobSpec, options: FitOptions) -> AdapterSettings | None:
    """How an adapter is trained; None: none is asked for.

    Raises:
        UsageError: it cannot be trained in the job's number type.
    """
    if options.adapter_rank is None:
        return None
    if spec.model.dtype == "float16":
        raise UsageError(
            "model.dtype: found float16; allowed with --adapter-rank: bfloat16 or float32, in "
            "which small gradients do not vanish"
        )
    chosen = (options.adapter_rank, options.adapter_steps, options.adapter_minutes)
    return AdapterSettings(*chosen, seed=options.seed)


def _searched(
    model: SegmentedModel, rows: Sequence[Row], spec: JobSpec, options: FitOptions, say: Say
) -> tuple[list[int], dict[str, Any]]:
    """The exit layers that are predicted to pay most, and the prediction.

    Raises:
        UsageError: none pays.
    """
    say("searching exit layers")
    costs = measured_costs(
        model,
        64,
        proposal_rank=options.proposal_rank,
        bridge_rank=options.bridge_rank,
        shortlist=options.shortlist,
        mlp_width=options.mlp_width(model.hidden_size),
    )
    costs = for_job(costs, spec.exit, rows)
    best = choose_exits(model, rows, costs, options.target)[0]
    if not best.layers:
        raise UsageError(
            f"exit layers: found none that pays at {options.target:.1%} unchanged tokens on these "
            "prompts; allowed: --layers names them all the same"
        )
    say(f"exits after {', '.join(map(str, best.layers))}: predicted {best.speed:.2f} times")
    return sorted(best.layers), best.to_json()
