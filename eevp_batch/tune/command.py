"""What `eevp-batch potential` does: load, generate at full depth, look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eevp_batch.engine.fitted import Affine, FittedExits
from eevp_batch.engine.load import load_weights
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.errors import FittedExitsError
from eevp_batch.model_config import ModelConfig, prompt_room, read_model_config
from eevp_batch.spec import Dtype, EngineSpec, InputSpec, ModelSpec, PromptSpec, SamplingSpec
from eevp_batch.tune.fit import split_rows
from eevp_batch.tune.outputs import full_depth_engine, generate_rows
from eevp_batch.tune.potential import measure_potential
from eevp_batch.tune.sample import sample_prompts
from eevp_batch.tune.search import Costs
from eevp_batch.tune.survey import quick_heads as fit_quick_heads

PROPOSAL_RANK, BRIDGE_RANK = 128, 128
"""What a fitted job would use; a raw one pays more."""

Say = Callable[[str], None]
"""Takes one line about what is going on."""


def run_potential(
    prompts: str,
    *,
    model: str,
    column: str,
    rows: int,
    max_new_tokens: int,
    dtype: Dtype,
    target: float,
    heads: str | None,
    quick_heads: bool,
    say: Say,
) -> dict[str, Any]:
    """Measure what exits could do; see `measure_potential`.

    Args:
        prompts: Parquet file, folder, glob or URI.
        model: local folder or hub id.
        column: of the prompts.
        rows: how many to generate for.
        max_new_tokens: of each generation.
        dtype: number type of weights and activations.
        target: share of all tokens that has to stay as at full depth.
        heads: folder of fitted exits.
        quick_heads: whether closed-form heads are fitted to half of the rows.
        say: progress.

    Raises:
        UsageError: something cannot be read, or does not belong together.
    """
    spec = ModelSpec(path=model, dtype=dtype)
    config = read_model_config(spec)
    lenses: dict[str, Mapping[int, Affine]] = {"raw": {}}
    if heads is not None:
        lenses["fitted"] = _heads_of(heads, config)
    tokenizer = load_tokenizer(config, spec)
    sampling = SamplingSpec(max_new_tokens=max_new_tokens)
    source = InputSpec(path=prompts, prompt_column=column)
    encoder = PromptEncoder(tokenizer, PromptSpec(), source, prompt_room(sampling, config))
    chosen = sample_prompts(prompts, encoder, rows)
    weights = load_weights(spec, config)
    segmented = SegmentedModel(weights, [config.num_layers])
    engine = full_depth_engine(weights, segmented, tokenizer, sampling, EngineSpec())
    say(f"generating for {len(chosen)} prompts at full depth")
    found = generate_rows(engine, chosen)
    if quick_heads:
        fitting, found = split_rows(found, 0.5, seed=0)
        say(f"fitting closed-form heads to {len(fitting)} of them")
        layers = range(1, config.num_layers)
        lenses["quick"] = fit_quick_heads(segmented, *split_rows(fitting, 0.2, seed=0), layers)
    say(f"looking at {len(found)} rows after each of {config.num_layers} layers")
    costs = Costs.counted(config, proposal_rank=PROPOSAL_RANK, bridge_rank=BRIDGE_RANK)
    return measure_potential(segmented, found, lenses, costs, target).to_json()


def _heads_of(folder: str, config: ModelConfig) -> Mapping[int, Affine]:
    """The heads of a folder of fitted exits.

    Raises:
        FittedExitsError: they are of another model.
    """
    fitted = FittedExits.load(Path(folder))
    if fitted.model_hash != config.content_hash:
        raise FittedExitsError(
            f"{folder}: model: found {fitted.model_hash[:12]}; allowed: "
            f"{config.content_hash[:12]}, that of {config.id}"
        )
    return fitted.heads
