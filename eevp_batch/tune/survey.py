"""What an exit after each layer would say: from raw states, closed-form heads, or fitted ones.

All layers at once, from teacher-forced passes; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from eevp_batch.engine.fitted import Affine, ExitHead, unit_state
from eevp_batch.engine.pruned_vocab import exact_best
from eevp_batch.engine.score_summary import summarise
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune.heads import SCORED_ROWS, head_output, last_choices
from eevp_batch.tune.regression import NormalEquations, RowSums, affine, fit_ridge
from eevp_batch.tune.search import LayerTable
from eevp_batch.tune.states import ForcedPass, Row, forced_passes

OnRows = Callable[[int, int], None]
"""Told how many rows are done, and of how many."""
SURVEY_TOKENS = 1024
"""Tokens of a pass; the states after all layers are held until the last one has spoken."""
QUICK_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Regularisations that are tried for heads that only have to be compared."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """An exit after one layer, over all deciding tokens; [S] of each.

    Attributes:
        margins: float32 top-1 minus top-2 probability.
        agrees: bool, whether its choice is the last layer's.
        ranks: int64, how many ids it scores above the last layer's choice.
    """

    margins: torch.Tensor
    agrees: torch.Tensor
    ranks: torch.Tensor

    def table(self, final_k: int | None = None) -> LayerTable:
        """For the search; `final_k` as `Costs` has it."""
        kept = None if final_k is None else (self.ranks < final_k).cpu()
        return LayerTable(self.margins.cpu(), self.agrees.cpu(), kept)

    @property
    def agreement(self) -> float:
        """Share of tokens whose choice is the last layer's."""
        return float(self.agrees.double().mean())

    def recall(self, k: int) -> float:
        """Share of tokens whose last layer's choice is among the k that score highest here."""
        return float((self.ranks < k).double().mean())


@torch.no_grad()
def survey(
    model: SegmentedModel,
    rows: Sequence[Row],
    layers: Sequence[int],
    heads: Mapping[int, ExitHead] | None = None,
    on_rows: OnRows | None = None,
) -> dict[int, LayerView]:
    """What exits would say of the rows' tokens.

    Args:
        model: cut anywhere.
        rows: one or more.
        layers: after which to look.
        heads: by layer; a layer without one is read through the final norm as it is.
        on_rows: progress.
    """
    heads = heads or {}
    parts: dict[int, list[LayerView]] = {layer: [] for layer in layers}
    done = 0
    for forced in forced_passes(model, rows, SURVEY_TOKENS):
        states = _deciding(forced, {*layers, model.num_layers})
        best = last_choices(model, states[model.num_layers])
        for layer in layers:
            parts[layer].append(_view(model, states[layer], heads.get(layer), best))
        done += len(forced.rows)
        if on_rows is not None:
            on_rows(done, len(rows))
    return {layer: _joined(views) for layer, views in parts.items()}


def _deciding(forced: ForcedPass, layers: set[int]) -> dict[int, torch.Tensor]:
    """States [S, E] of the deciding tokens after some layers."""
    return {layer: hidden[forced.deciding] for layer, hidden in forced.layers() if layer in layers}


def _view(
    model: SegmentedModel, hidden: torch.Tensor, head: ExitHead | None, best_ids: torch.Tensor
) -> LayerView:
    """What an exit says of states [S, E], S small enough for a pass."""
    views = []
    for rows, best in zip(
        torch.split(hidden, SCORED_ROWS), torch.split(best_ids, SCORED_ROWS), strict=True
    ):
        if head is None:
            normed = model.normed(rows)
        else:
            normed = head_output(model, head, unit_state(rows, model.norm_eps))
        scores = model.scores(normed)
        found = summarise(scores)
        said = exact_best(normed, model.head_weight, scores, None, found)
        ranks = (scores > scores.gather(1, best[:, None])).sum(-1)
        margins = (found.best - found.lse).exp() - (found.second - found.lse).exp()
        views.append(LayerView(margins, said == best, ranks))
    return _joined(views)


def _joined(views: Sequence[LayerView]) -> LayerView:
    return LayerView(
        torch.cat([view.margins for view in views]),
        torch.cat([view.agrees for view in views]),
        torch.cat([view.ranks for view in views]),
    )


@torch.no_grad()
def quick_heads(
    model: SegmentedModel,
    fitting: Sequence[Row],
    held_out: Sequence[Row],
    layers: Sequence[int],
    on_rows: OnRows | None = None,
) -> dict[int, Affine]:
    """Closed-form heads at many layers, to choose exit layers by.

    Their sums take 4 E^2 numbers of 8 bytes per layer: of a wide model look at some layers only.

    Args:
        model: cut anywhere.
        fitting: rows to fit to.
        held_out: rows that choose the regularisation.
        layers: below the last one.
        on_rows: progress.
    """
    total = len(fitting) + len(held_out)
    sums = []
    for rows, before in ((fitting, 0), (held_out, len(fitting))):
        sums.append(_head_sums(model, rows, layers, before, total, on_rows))
    last = model.num_layers
    heads = {}
    for layer in layers:
        maps = fit_ridge(sums[0][layer], sums[1][layer], QUICK_PENALTIES)
        heads[layer] = affine(maps[last], torch.float32)
    return heads


def _head_sums(
    model: SegmentedModel,
    rows: Sequence[Row],
    layers: Sequence[int],
    done: int,
    total: int,
    on_rows: OnRows | None,
) -> dict[int, NormalEquations]:
    """By layer, sums of the change of the unit state from there to the last layer."""
    sums = {layer: RowSums(model.hidden_size, model.device) for layer in layers}
    for forced in forced_passes(model, rows, SURVEY_TOKENS):
        states = _deciding(forced, {*layers, model.num_layers})
        goal = unit_state(states[model.num_layers], model.norm_eps)
        for layer in layers:
            units = unit_state(states[layer], model.norm_eps)
            block = sums[layer].block(units)
            sums[layer].add_inputs(block)
            sums[layer].add_target(model.num_layers, block, goal - units)
        done += len(forced.rows)
        if on_rows is not None:
            on_rows(done, total)
    return {layer: rows_sum.total() for layer, rows_sum in sums.items()}
