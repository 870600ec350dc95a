"""Which exits to take, found out on the job's own rows before anything is trained for long."""

from __future__ import annotations

from collections.abc import Sequence

from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune.fit import split_rows
from eevp_batch.tune.search import Costs, ExitChoice, search_exits
from eevp_batch.tune.states import Row
from eevp_batch.tune.survey import OnRows, quick_heads, survey

LOOKED_AT = 0.2
"""Share of the rows that the candidates are judged by; another such share regularises them."""


def choose_exits(
    model: SegmentedModel,
    rows: Sequence[Row],
    costs: Costs,
    target: float = 0.99,
    most_exits: int = 2,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    on_rows: OnRows | None = None,
) -> list[ExitChoice]:
    """Judge exits by closed-form heads after every candidate layer.

    Trained heads agree more often, so that shares and speeds are lower bounds; the order of the
    layers is what is taken from here.

    Args:
        model: cut anywhere.
        rows: full-depth generations, three or more.
        costs: what each part costs.
        target: share of all tokens that has to stay as at full depth.
        most_exits: 1 or 2.
        layers: candidates; all layers below the last.
        seed: of the split of the rows.
        on_rows: progress.

    Returns:
        The one that pays most first; "no exits" is among them.
    """
    layers = list(layers or range(1, model.num_layers))
    others, looked_at = split_rows(rows, LOOKED_AT, seed)
    fitting, held_out = split_rows(others, LOOKED_AT, seed)
    heads = quick_heads(model, fitting, held_out, layers, on_rows)
    views = survey(model, looked_at, layers, heads, on_rows)
    tables = {layer: view.table(costs.final_k) for layer, view in views.items()}
    return search_exits(tables, costs, target, most_exits)
