"""Everything that is fitted for a job, an adapter of the model first.

The adapter comes first, with closed-form heads and bridges of the original in its loop, and the
real heads, bridges and the proposal are fitted to the adapted model's states afterwards: they are
cheap, and exact for the model that the job will run. What all of them are held to is what the
*original* generated, with its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eevp_batch.engine.adapter import Adapter, merge
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.packed_linear import lacks_products
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ShortPrompt
from eevp_batch.engine.stored_weights import settle
from eevp_batch.tune.adapter_training import AdapterSettings, AdapterTraining, Trained
from eevp_batch.tune.fit import (
    FitSettings,
    Gathered,
    OnProgress,
    Steps,
    fit_bridges,
    fit_collected,
    gather,
    ridge_head,
)
from eevp_batch.tune.head_training import WhitenedHead
from eevp_batch.tune.lora import LoraModel
from eevp_batch.tune.states import Row


@dataclass(frozen=True, slots=True)
class Adapting:
    """How a model is adapted.

    Attributes:
        settings: of the training.
        load: the original's weights once more, to train and to merge into.
        folder: gets checkpoints.
    """

    settings: AdapterSettings
    load: Callable[[], PreTrainedModel]
    folder: Path


def fit_adapted(
    model: SegmentedModel,
    model_hash: str,
    rows: Sequence[Row],
    settings: FitSettings,
    adapting: Adapting,
    data: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> FittedExits:
    """Train an adapter, and fit heads, bridges and the proposal to the model with it.

    Args:
        model: the original, cut anywhere.
        model_hash: content hash of its folder.
        rows: what it generated at full depth.
        settings: what is fitted, and how.
        adapting: how the adapter is trained.
        data: where the rows are from; written into the manifest.
        on_progress: progress.

    Raises:
        UsageError: too few rows, or exit layers that the model does not have.
    """
    before = gather(model, rows, settings, data, on_progress)
    trained = _trained(model, model_hash, before, adapting, Steps(on_progress))
    adapted = adapted_model(adapting.load(), trained.adapter)
    found = gather(adapted, rows, before.settings, data, on_progress, before)
    parts = (found.seen, found.judged, found.settings, found.facts)
    fitted = fit_collected(adapted, model_hash, *parts, on_progress)
    kept = found.judged.taught[settings.exit_layers[0]].kept
    adapter = {
        "settings": asdict(adapting.settings),
        "steps": trained.steps,
        "seconds": round(trained.seconds, 2),
        "parameters": sum(tensor.numel() for tensor in trained.adapter.tensors().values()),
        "full_depth_agreement": 1.0 if kept is None else float(kept.double().mean()),
        "curve": trained.curve,
    }
    figures = dict(fitted.facts["figures"])
    figures |= {"adapter": adapter, "fit_s": round(figures["fit_s"] + trained.seconds, 2)}
    facts = {**fitted.facts, "figures": figures}
    return replace(fitted, adapter=trained.adapter, facts=facts)


def adapted_model(weights: PreTrainedModel, adapter: Adapter) -> SegmentedModel:
    """The model with an adapter, laid out; cut at its last layer."""
    merge(weights, adapter)
    return SegmentedModel(weights, [weights.config.num_hidden_layers])


def _trained(
    model: SegmentedModel, model_hash: str, found: Gathered, adapting: Adapting, steps: Steps
) -> Trained:
    """The adapter, with what is fitted to the original in its loop."""
    settings, seen, judged = found.settings, found.seen, found.judged
    bridges, _ = fit_bridges(model, seen, judged, settings, Steps(None))
    heads = {}
    for layer in settings.exit_layers:
        start = ridge_head(model, seen.heads[layer], judged.heads[layer])
        heads[layer] = WhitenedHead(start, seen.taught[layer].units)
    weights = adapting.load()
    body: Any = weights.model
    settle(body, model.device)
    if lacks_products(body.embed_tokens.weight):
        body.float()
    training = AdapterTraining(
        model,
        LoraModel(weights, adapting.settings.rank, adapting.settings.seed),
        found.fitting,
        seen.targets,
        heads,
        bridges,
        ShortPrompt(settings.exit_layers[0], settings.tail, settings.lead or 0),
        adapting.settings,
    )
    with torch.enable_grad():
        return training.run(adapting.folder, model_hash, steps.of("adapter"))
