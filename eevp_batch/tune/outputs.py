"""Full-depth generations of some prompts: what everything is fitted to and measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eevp_batch.engine.cut import end_ids
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.limits import resolve_limits
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, JobSpec, SamplingSpec
from eevp_batch.storage.location import seen_from
from eevp_batch.tune.job_rows import drawn_prompts, output_rows
from eevp_batch.tune.states import Row


def data_facts(spec: JobSpec, source: str | None, seed: int, folder: Path) -> dict[str, Any]:
    """Where rows are from, as a file in a folder tells it.

    Args:
        spec: the job.
        source: a finished output that they were drawn from; None: they were generated.
        seed: of the choice.
        folder: that the file is in.
    """
    paths = [spec.input.path] if isinstance(spec.input.path, str) else spec.input.path
    inputs = [seen_from(folder, path) for path in paths]
    return {
        "input": inputs[0] if len(inputs) == 1 else inputs,
        "from": None if source is None else seen_from(folder, source),
        "seed": seed,
    }


def full_depth_engine(
    weights: PreTrainedModel,
    model: SegmentedModel,
    tokenizer: Any,
    sampling: SamplingSpec,
    limits: EngineSpec,
) -> Engine:
    """An engine without exits around a model that is cut already; its layers are not copied.

    Args:
        weights: what the model was made from.
        model: cut anywhere.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen and when a generation ends.
        limits: batch and memory.

    Raises:
        UsageError: the settings do not fit the device.
    """
    whole = model.recut([model.num_layers])
    return Engine(
        model=whole,
        tokenizer=tokenizer,
        exits=ExitSpec(mode="off"),
        sampling=sampling,
        prune_layer=None,
        end_ids=end_ids(weights, tokenizer),
        limits=resolve_limits(limits, whole, weights.config.max_position_embeddings),
    )


def generate_rows(
    engine: Engine,
    prompts: Iterable[Sequence[int]],
    on_row: Callable[[int], None] | None = None,
) -> list[Row]:
    """The generations of all prompts, in their order; rows that fail are left out.

    Args:
        engine: exits off.
        prompts: token ids of each.
        on_row: told how many rows are done, each time one is.
    """
    numbered = [Prompt(number, list(token_ids)) for number, token_ids in enumerate(prompts)]
    found: dict[int, Row] = {}
    for result in engine.generate(numbered):
        if isinstance(result, Generation):
            number = int(result.row_id)
            found[number] = Row(numbered[number].token_ids, result.token_ids)
        if on_row is not None:
            on_row(len(found))
    return [found[number] for number in sorted(found)]


def full_depth_rows(
    spec: JobSpec,
    fields: Mapping[str, Any],
    encoder: PromptEncoder,
    engine: Callable[[], Engine],
    say: Callable[[str], None],
    source: str | None,
    num_rows: int,
    seed: int,
    without: Iterable[str] = (),
) -> list[Row]:
    """Random rows of a job at full depth, in random order.

    Args:
        spec: the job.
        fields: of its plan, by dotted name.
        encoder: of the job.
        engine: makes one without exits, where rows have to be generated.
        say: progress.
        source: a finished full-depth output to draw from; None: rows are generated.
        num_rows: how many rows are drawn.
        seed: of the choice.
        without: keys of prompts that are left out, see `prompt_key`.

    Raises:
        UsageError: there is no row, or the output is not one of this job at full depth.
        JobFailedError: a part or the input cannot be read.
    """
    if source is not None:
        return output_rows(source, fields, encoder, num_rows, seed, without)
    prompts = drawn_prompts(spec.input, encoder, num_rows, seed, without)
    say(f"generating for {len(prompts)} prompts at full depth")
    return generate_rows(engine(), prompts)
