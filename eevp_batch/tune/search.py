"""Where should the exits lie? Searched over every layer, by what an exit costs and what it saves.

Knows confidences, who agrees, and costs; nothing of how they were found.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eevp_batch.model_config import ModelConfig
from eevp_batch.tune.bridges import lift_size, usual_rank

BUDGET_SPLITS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the allowed disagreement that the first of two exits may use up."""
GATHER_COST = 20
"""Multiply-adds of a product that take as long as one of a head row read for one token alone."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What each part costs per token, in any one unit (seconds, multiply-adds, layers).

    Attributes:
        num_layers: L.
        layer: a decoder layer, attention included.
        head: the LM head over the whole vocabulary, and reading its scores.
        proposal: the kept ids chosen and scored at the first exit; the head's cost, where it is
            the head that proposes.
        rescoring: the kept ids scored at a later exit.
        exit_head: the fitted head before the final norm.
        bridge: keys and values of one skipped layer.
        prompts: prompt tokens that are computed for each generated one, see `for_job`.
        bridges_prompts: whether they run to the first exit layer only.
        final_k: K, where the last layer scores only the kept ids too; None: the whole vocabulary.
    """

    num_layers: int
    layer: float
    head: float
    proposal: float
    rescoring: float
    exit_head: float
    bridge: float
    prompts: float = 0.0
    bridges_prompts: bool = False
    final_k: int | None = None

    @classmethod
    def counted(
        cls,
        model: ModelConfig,
        top_k: int | None = 256,
        proposal_rank: int | None = None,
        bridge_rank: int | None = None,
        shortlist: int | None = None,
        mlp_width: int | None = None,
    ) -> Costs:
        """Multiply-adds of the matrices, attention left out.

        Args:
            model: shapes.
            top_k: K, kept ids; None: no pruning, every exit pays the whole head.
            proposal_rank: of a low-rank proposal, if there is one.
            bridge_rank: of the bridges; None: the usual one.
            shortlist: ids of a shortlist, if there is one; the cheapest proposal counts.
            mlp_width: hidden units of the exit heads' MLPs; None: they are affine.
        """
        width, vocab, kv = model.hidden_size, model.vocab_size, model.kv_values_per_token
        kv //= model.num_layers
        rank = bridge_rank or usual_rank(width)
        head = float(model.head_weights)
        proposal = rescoring = head
        if top_k is not None:
            rescoring = min(head, float(GATHER_COST * top_k * width))
            if proposal_rank is not None:
                proposal = min(head, proposal_rank * (width + vocab) + rescoring)
            if shortlist is not None:
                proposal = min(proposal, float(shortlist * width))
        return cls(
            num_layers=model.num_layers,
            layer=float(model.layer_weights),
            head=head,
            proposal=proposal,
            rescoring=rescoring,
            exit_head=float(width * (width + 2 * (mlp_width or 0))),
            bridge=rank * (kv + (2 * width + lift_size(width)) / model.num_layers),
        )

    @property
    def full_depth(self) -> float:
        """A generated token without exits, and the prompt tokens that come with it."""
        return (1 + self.prompts) * self.num_layers * self.layer + self.head

    def with_exits(self, layers: Sequence[int], shares: Sequence[float]) -> float:
        """A generated token on average, and the prompt tokens that come with it.

        Args:
            layers: exit layers, the last layer apart, increasing.
            shares: of all tokens, who leaves after each.
        """
        run = layers[0] if layers and self.bridges_prompts else self.num_layers
        total = self.prompts * (run * self.layer + (self.num_layers - run) * self.bridge)
        before, staying = 0, 1.0
        for position, (layer, share) in enumerate(zip(layers, shares, strict=True)):
            asking = self.exit_head + self.rescoring if position else self.exit_check
            total += staying * ((layer - before) * self.layer + asking)
            total += share * (self.num_layers - layer) * self.bridge
            before, staying = layer, staying - share
        end = self.head if self.final_k is None else self.rescoring
        return total + staying * ((self.num_layers - before) * self.layer + end)

    def speed(self, layers: Sequence[int], shares: Sequence[float]) -> float:
        """As a multiple of full depth; without exit layers nobody asks, and it is 1."""
        return self.full_depth / self.with_exits(layers, shares) if layers else 1.0

    @property
    def exit_check(self) -> float:
        """To ask at the first exit."""
        return self.exit_head + self.proposal


@dataclass(frozen=True, slots=True)
class LayerTable:
    """What an exit after a layer would say of some tokens, the same ones for every layer.

    Attributes:
        confidences: [S].
        agrees: [S] bool, whether it is what the last layer says.
        kept: [S] bool, whether what the last layer says is among the ids that would be kept here,
            and so may still be said; None: it may be whatever is kept.
    """

    confidences: torch.Tensor
    agrees: torch.Tensor
    kept: torch.Tensor | None = None

    def budget(self, target: float) -> float:
        """How many tokens may leave wrong where this exit is the first; below 0: it may not be."""
        missing = 0 if self.kept is None else int((~self.kept).sum())
        return (1 - target) * len(self.agrees) - missing


@dataclass(frozen=True, slots=True)
class ExitChoice:
    """Exits that could be taken.

    Attributes:
        layers: exit layers, the last layer apart; none: exits do not pay.
        thresholds: of the confidence.
        shares: of all tokens, who leaves after each.
        disagreement: share of all tokens that would leave as another than at full depth.
        speed: predicted, as a multiple of full depth.
    """

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    disagreement: float
    speed: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "layers": list(self.layers),
            "thresholds": list(self.thresholds),
            "shares": list(self.shares),
            "disagreement": self.disagreement,
            "speed": self.speed,
        }


def search_exits(
    tables: Mapping[int, LayerTable],
    costs: Costs,
    target: float = 0.99,
    most_exits: int = 2,
) -> list[ExitChoice]:
    """Every set of one or two exits with the boldest thresholds that the target allows.

    That bridged keys and values change later tokens is not predicted; calibration measures it. So
    exits have to pay by generated tokens alone: else bridged prompts, which seem to cost nothing,
    would draw the first exit to the first layer.

    Args:
        tables: by candidate layer.
        costs: what each part costs; bridged prompts count in the speeds, not in the order.
        target: share of all tokens that must leave as they would at full depth.
        most_exits: 1 or 2.

    Returns:
        The one that pays most first; "no exits" (speed 1) is among them.
    """
    whole, costs = costs, replace(costs, bridges_prompts=False)
    found = [ExitChoice((), (), (), 0.0, 1.0)]
    layers = sorted(tables)
    firsts = [layer for layer in layers if tables[layer].budget(target) > -1e-9]
    for layer in firsts:
        found.append(_chosen(tables, costs, (layer,), target, (1.0,)))
    if most_exits > 1:
        for pair in itertools.combinations(layers, 2):
            if pair[0] not in firsts:
                continue
            tried = [_chosen(tables, costs, pair, target, (s, 1.0)) for s in BUDGET_SPLITS]
            found.append(max(tried, key=lambda choice: choice.speed))
    found.sort(key=lambda choice: (-choice.speed, len(choice.layers), choice.layers))
    return [replace(choice, speed=whole.speed(choice.layers, choice.shares)) for choice in found]


def _chosen(
    tables: Mapping[int, LayerTable],
    costs: Costs,
    layers: tuple[int, ...],
    target: float,
    splits: tuple[float, ...],
) -> ExitChoice:
    """The boldest thresholds that spend at most these shares of the allowed disagreement.

    Args:
        tables: by layer.
        costs: what each part costs.
        layers: exit layers.
        target: of agreement.
        splits: of the allowed disagreement, what may be spent up to and including each exit.
    """
    first = tables[layers[0]]
    count = len(first.agrees)
    staying = torch.ones(count, dtype=torch.bool)
    # What is not kept at the first exit is wrong wherever it leaves.
    lost = torch.zeros_like(staying) if first.kept is None else ~first.kept
    budget = first.budget(target)
    spent, thresholds, shares = 0, [], []
    for layer, split in zip(layers, splits, strict=True):
        table = tables[layer]
        agrees = table.agrees | lost
        allowed = int(split * budget + 1e-9) - spent
        threshold = boldest(table.confidences[staying], agrees[staying], allowed)
        leaves = staying & (table.confidences > threshold)
        spent += int((leaves & ~agrees).sum())
        thresholds.append(threshold)
        shares.append(float(leaves.sum()) / count)
        staying = staying & ~leaves
    speed = costs.speed(layers, shares)
    wrong = (int(lost.sum()) + spent) / count
    return ExitChoice(layers, tuple(thresholds), tuple(shares), wrong, speed)


def boldest(confidences: torch.Tensor, agrees: torch.Tensor, allowed: int) -> float:
    """The lowest threshold above which at most `allowed` tokens do not agree.

    Args:
        confidences: [S].
        agrees: [S] bool.
        allowed: 0 or more.
    """
    wrong = confidences[~agrees].sort(descending=True).values
    return float(wrong[allowed]) if len(wrong) > allowed else 0.0
