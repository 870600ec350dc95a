"""Exit heads: maps that make the state after a middle layer decodable.

The state that goes into the final norm at an exit is u + A u + b, u the unit state there (a tuned
lens, arXiv 2303.08112, section 3; zeros are the logit lens), and where it is asked for what an MLP
makes of u. A head starts from the ridge solution for the last layer's unit state and is then fitted
to the full model's distribution itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from eevp_batch.engine.fitted import Affine, ExitHead
from eevp_batch.engine.pruned_vocab import exact_best, top_k
from eevp_batch.engine.score_summary import summarise
from eevp_batch.engine.segmented_model import SegmentedModel

SCORED_ROWS = 64
"""States scored at a time: what the engine found fastest on a CPU."""
TAUGHT_IDS = 64
"""Ids of a token whose probabilities the heads are taught one by one; the others share a bucket."""


@dataclass(frozen=True, slots=True)
class Taught:
    """Some tokens: the states after an exit layer, and what the last layer makes of them.

    Attributes:
        units: [S, E] float32 unit states.
        best_ids: [S] the full model's choices.
        ids: [S, K] int64 its likeliest ids.
        probabilities: [S, K] float32 theirs.
        kept: [S] bool, whether the last layer behind these states makes the same choice; None: it
            is the one that made it.
    """

    units: torch.Tensor
    best_ids: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor
    kept: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.units)

    def __add__(self, other: Taught) -> Taught:
        kept = None
        if self.kept is not None and other.kept is not None:
            kept = torch.cat([self.kept, other.kept])
        return Taught(
            torch.cat([self.units, other.units]),
            torch.cat([self.best_ids, other.best_ids]),
            torch.cat([self.ids, other.ids]),
            torch.cat([self.probabilities, other.probabilities]),
            kept,
        )


@dataclass(frozen=True, slots=True)
class Targets:
    """What the full model made of rows' generated tokens, row after row.

    Attributes:
        best_ids: [S] its choices.
        ids: [S, K] int64 its likeliest ids.
        probabilities: [S, K] float32 theirs.
        starts: of each row, and S.
    """

    best_ids: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor
    starts: Sequence[int]

    def of(self, row_numbers: Sequence[int]) -> Targets:
        """Those of some rows, in that order."""
        spans = [range(self.starts[number], self.starts[number + 1]) for number in row_numbers]
        places = torch.tensor(list(chain(*spans)), dtype=torch.int64, device=self.ids.device)
        return Targets(
            self.best_ids[places],
            self.ids[places],
            self.probabilities[places],
            [0, *accumulate(map(len, spans))],
        )


def identity_head(width: int, device: torch.device) -> Affine:
    """The head that is the logit lens."""
    return Affine(torch.zeros(width, width, device=device), torch.zeros(width, device=device))


def head_output(model: SegmentedModel, head: ExitHead, units: torch.Tensor) -> torch.Tensor:
    """What the LM head is given at an exit, [S, E] float32 -> [S, E] of the model's type."""
    return model.normed((units + head(units)).to(model.layers.hidden_dtype))


@torch.no_grad()
def teach(
    model: SegmentedModel, hidden: torch.Tensor, k: int = TAUGHT_IDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the full model makes of states [S, E] after its last layer.

    Returns:
        Its choices [S], its likeliest ids [S, k] and their probabilities [S, k] float32.
    """
    best, ids, probabilities = [], [], []
    for rows in torch.split(hidden, SCORED_ROWS):
        normed = model.normed(rows)
        scores = model.scores(normed)
        found = summarise(scores)
        values, columns = top_k(scores, min(k, scores.shape[1]), found.blocks)
        best.append(exact_best(normed, model.head_weight, scores, None, found))
        ids.append(columns)
        probabilities.append((values.float() - found.lse[:, None]).exp())
    return torch.cat(best), torch.cat(ids), torch.cat(probabilities)


@torch.no_grad()
def last_choices(model: SegmentedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What a model says of states [S, E] after its last layer, [S]."""
    found = []
    for rows in torch.split(hidden, SCORED_ROWS):
        normed = model.normed(rows)
        scores = model.scores(normed)
        found.append(exact_best(normed, model.head_weight, scores, None, summarise(scores)))
    return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Choices:
    """What an exit would say; [S] of each.

    Attributes:
        ids: its choices.
        margins: top-1 minus top-2 probability, float32.
    """

    ids: torch.Tensor
    margins: torch.Tensor


@torch.no_grad()
def choices(model: SegmentedModel, head: ExitHead, units: torch.Tensor) -> Choices:
    """What an exit with this head says of unit states [S, E]."""
    ids, margins = [], []
    for rows in torch.split(units, SCORED_ROWS):
        normed = head_output(model, head, rows)
        scores = model.scores(normed)
        found = summarise(scores)
        ids.append(exact_best(normed, model.head_weight, scores, None, found))
        best = (found.best - found.lse).exp()
        margins.append(best - (found.second - found.lse).exp())
    return Choices(torch.cat(ids), torch.cat(margins))


def agreement(found: Choices, best_ids: torch.Tensor) -> float:
    """Share of tokens for which the exit says what the last layer says."""
    return float((found.ids == best_ids).double().mean())


def share_leaving(found: Choices, best_ids: torch.Tensor, target: float) -> float:
    """The largest share of tokens that leaves with at least `target` of *those* in agreement.

    The most confident leave first: an optimistic figure, for the threshold is chosen on the tokens
    it is judged by.
    """
    order = found.margins.argsort(descending=True, stable=True)
    agrees = (found.ids == best_ids)[order].double()
    numbers = torch.arange(1, len(agrees) + 1, device=agrees.device)
    good = (agrees.cumsum(0) / numbers >= target).nonzero()
    return float(good[-1] + 1) / len(agrees) if len(good) else 0.0


def share_leaving_of_all(found: Choices, tokens: Taught, target: float) -> float:
    """The largest share of tokens that leaves with at least `target` of *all* tokens as they were.

    Those that stay are what the last layer says. As optimistic as `share_leaving`.
    """
    order = found.margins.argsort(descending=True, stable=True)
    margins, agrees = found.margins[order], (found.ids == tokens.best_ids)[order]
    stays = torch.ones_like(agrees) if tokens.kept is None else tokens.kept[order]
    # Wrong tokens once the n most confident leave, n = 0..S.
    changes = (~agrees).long() - (~stays).long()
    wrong = torch.nn.functional.pad(changes.cumsum(0), (1, 0)) + int((~stays).sum())
    allowed = int((1 - target) * len(agrees) + 1e-9)
    # A threshold cannot part tokens of one confidence, and what has none at all never leaves.
    ends = torch.nn.functional.pad(margins[1:] != margins[:-1], (1, 1), value=True)
    ends[1:] &= margins > 0
    good = ((wrong <= allowed) & ends).nonzero()
    return float(good[-1]) / len(agrees) if len(good) else 0.0
