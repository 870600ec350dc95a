"""Could exits pay on this model and these prompts? Measured before anything is trained for long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eevp_batch.engine.fitted import ExitHead
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune.search import Costs, ExitChoice, search_exits
from eevp_batch.tune.states import Row
from eevp_batch.tune.survey import LayerView, OnRows, survey

RECALL_SIZES = (64, 256, 1024)
WORTH_TAKING = 1.1
"""Predicted speed below which exits are not worth their trouble: the prediction is no better."""


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """An exit after one layer.

    Attributes:
        layer: 1..L - 1.
        agreement: share of tokens whose choice is the last layer's.
        recall: share of tokens whose last layer's choice is among the K best here, by K.
        leaving: largest share of all tokens that leaves so that `target` of all stay as they were.
    """

    layer: int
    agreement: float
    recall: Mapping[int, float]
    leaving: float


@dataclass(frozen=True, slots=True)
class LensFigures:
    """All exits, read in one way.

    Attributes:
        name: `raw` (the final norm alone), `quick` (closed-form heads) or `fitted`.
        layers: each layer that was looked at.
        earliest: tokens by the first of these layers that agrees with the last, L for the others.
        oracle_saving: share of all layers that leaving there would save.
        best: the exits with the best predicted speed.
    """

    name: str
    layers: Sequence[LayerFigures]
    earliest: Mapping[int, int]
    oracle_saving: float
    best: ExitChoice


@dataclass(frozen=True, slots=True)
class Potential:
    """What exits could do.

    Attributes:
        num_layers: L.
        rows, tokens: looked at.
        target: share of all tokens that has to stay as at full depth.
        lenses: one for each way of reading the exits.
        verdict: one sentence.
    """

    num_layers: int
    rows: int
    tokens: int
    target: float
    lenses: Sequence[LensFigures]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; numbers that are keys become strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def measure_potential(
    model: SegmentedModel,
    rows: Sequence[Row],
    lenses: Mapping[str, Mapping[int, ExitHead]],
    costs: Costs,
    target: float = 0.99,
    on_rows: OnRows | None = None,
) -> Potential:
    """Look at every layer through each lens.

    Args:
        model: cut anywhere.
        rows: full-depth generations.
        lenses: heads by layer, by the lens's name; without heads every layer is read as it is,
            with heads only theirs are.
        costs: for the predicted speed.
        target: share of all tokens that has to stay as at full depth.
        on_rows: progress, for each lens anew.
    """
    figures = []
    for name, heads in lenses.items():
        layers = sorted(heads) or list(range(1, model.num_layers))
        views = survey(model, rows, layers, heads, on_rows)
        figures.append(_lens(name, views, model.num_layers, costs, target))
    tokens = sum(len(row.generated_ids) for row in rows)
    verdict = _verdict(figures, model.num_layers, costs, target)
    return Potential(model.num_layers, len(rows), tokens, target, figures, verdict)


def _lens(
    name: str, views: Mapping[int, LayerView], num_layers: int, costs: Costs, target: float
) -> LensFigures:
    tables = {layer: view.table(costs.final_k) for layer, view in views.items()}
    choices = search_exits(tables, costs, target)
    leaving = {c.layers[0]: c.shares[0] for c in choices if len(c.layers) == 1}
    agrees = torch.stack([view.agrees for view in views.values()])  # [layers, S]
    agrees = torch.cat([agrees, torch.ones_like(agrees[:1])])
    numbers = torch.tensor([*views, num_layers], device=agrees.device)
    first = numbers[agrees.int().argmax(0)].tolist()
    counts = Counter(first)
    return LensFigures(
        name=name,
        layers=[
            LayerFigures(
                layer=layer,
                agreement=view.agreement,
                recall={k: view.recall(k) for k in RECALL_SIZES},
                leaving=leaving[layer],
            )
            for layer, view in views.items()
        ],
        earliest={layer: counts[layer] for layer in sorted(counts)},
        oracle_saving=1 - sum(first) / len(first) / num_layers,
        best=choices[0],
    )


def _verdict(lenses: Sequence[LensFigures], num_layers: int, costs: Costs, target: float) -> str:
    lens = max(lenses, key=lambda lens: lens.best.speed)
    best, read_by = lens.best, {"raw": "as the model stands"}.get(lens.name, f"{lens.name} heads")
    if best.speed >= WORTH_TAKING:
        places = " and ".join(str(layer) for layer in best.layers)
        return (
            f"Exits can pay ({read_by}): {sum(best.shares):.0%} of the tokens could leave after "
            f"layer {places} of {num_layers} while {target:.1%} of all tokens stay as they were, "
            f"about {best.speed:.1f} times the speed of full depth by counted work."
        )
    widest = max(lens.layers, key=lambda layer: layer.leaving * (num_layers - layer.layer))
    advice = "; heads fitted to this job may change that" if lens.name == "raw" else ""
    return (
        f"Exits will not pay ({read_by}): at {target:.1%} unchanged tokens the most useful exit, "
        f"after layer {widest.layer} of {num_layers}, lets {widest.leaving:.0%} of the tokens "
        f"leave, and to ask there costs as much as {costs.exit_check / costs.layer:.1f} layers "
        f"(an oracle would save {lens.oracle_saving:.0%} of all layers){advice}."
    )
