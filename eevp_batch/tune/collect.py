"""One pass over some rows, and all that the fits need of it: sums for bridges, states for heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from eevp_batch.engine.fitted import unit_state
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind
from eevp_batch.tune.heads import Taught, teach
from eevp_batch.tune.regression import NormalEquations, with_constant
from eevp_batch.tune.states import ForcedPass, Row, forced_passes


@dataclass(frozen=True, slots=True)
class Collected:
    """What one pass over some rows leaves.

    Attributes:
        bridges: sums by kind of token and exit layer, one target per layer behind the exit.
        heads: sums by exit layer; the target, named by the last layer, is the change of the unit
            state up to there.
        taught: deciding tokens by exit layer, for the heads.
    """

    bridges: Mapping[tuple[Kind, int], NormalEquations]
    heads: Mapping[int, NormalEquations]
    taught: Mapping[int, Taught]

    def __add__(self, other: Collected) -> Collected:
        return Collected(
            {origin: sums + other.bridges[origin] for origin, sums in self.bridges.items()},
            {e: sums + other.heads[e] for e, sums in self.heads.items()},
            {e: tokens + other.taught[e] for e, tokens in self.taught.items()},
        )


class _Collector:
    """Adds passes up."""

    def __init__(
        self,
        model: SegmentedModel,
        exit_layers: Sequence[int],
        prompt_bridge: bool,
        lead: int,
    ) -> None:
        self._model, self._exits, self._lead = model, list(exit_layers), lead
        origins: list[tuple[Kind, int]] = [("generated", e) for e in self._exits]
        if prompt_bridge:
            origins.append(("prompt", self._exits[0]))

        def empty() -> NormalEquations:
            return NormalEquations.empty(model.hidden_size, model.device)

        self._bridges = {origin: empty() for origin in origins}
        self._heads = {e: empty() for e in self._exits}
        self._units: dict[int, list[torch.Tensor]] = {e: [] for e in self._exits}
        self._taught: list[tuple[torch.Tensor, ...]] = []
        self._seen: set[int] = set()

    def add(self, forced: ForcedPass) -> None:
        """One pass."""
        last = self._model.num_layers
        inputs: dict[tuple[Kind, int], torch.Tensor] = {}
        rows = {"generated": forced.generated, "prompt": self._unseen(forced)}
        for layer, hidden in forced.layers():
            if layer in self._exits:
                units = unit_state(hidden, self._model.norm_eps)
                self._units[layer].append(units[forced.deciding])
                for origin in self._bridges:
                    if origin[1] == layer:
                        inputs[origin] = with_constant(units[rows[origin[0]]])
                        self._bridges[origin].add_inputs(inputs[origin])
            if layer == last:
                self._teach(hidden[forced.deciding])
            elif inputs:
                values = self._model.layers.kv_of(layer, hidden)
                for origin, columns in inputs.items():
                    picked = values[rows[origin[0]]]
                    self._bridges[origin].add_target(layer + 1, columns, picked)

    def _unseen(self, forced: ForcedPass) -> torch.Tensor:
        """Prompt tokens behind the lead whose beginning no earlier row shared.

        A shared beginning has the same states in every row; counted each time, a long template
        would drown what differs.
        """
        unseen, places = [], iter(forced.prompt.tolist())
        for row in forced.rows:
            beginning = 0
            for position, token_id in enumerate(row.prompt_ids):
                beginning = hash((beginning, token_id))
                if position < forced.num_shared:
                    continue
                place = next(places)
                if position >= self._lead and beginning not in self._seen:
                    self._seen.add(beginning)
                    unseen.append(place)
        return torch.tensor(unseen, dtype=torch.int64, device=self._model.device)

    def _teach(self, hidden: torch.Tensor) -> None:
        self._taught.append(teach(self._model, hidden))
        goal = unit_state(hidden, self._model.norm_eps)
        for e, sums in self._heads.items():
            units = self._units[e][-1]
            columns = with_constant(units)
            sums.add_inputs(columns)
            sums.add_target(self._model.num_layers, columns, goal - units)

    def collected(self) -> Collected:
        """All of it."""
        best, ids, probabilities = (torch.cat(column) for column in zip(*self._taught, strict=True))
        taught = {
            e: Taught(torch.cat(units), best, ids, probabilities)
            for e, units in self._units.items()
        }
        return Collected(self._bridges, self._heads, taught)


@torch.no_grad()
def collect(
    model: SegmentedModel,
    rows: Sequence[Row],
    exit_layers: Sequence[int],
    prompt_bridge: bool = True,
    lead: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """Run rows through all layers and keep what the fits need.

    Args:
        model: cut anywhere.
        rows: one or more.
        exit_layers: increasing, the last layer apart.
        prompt_bridge: whether tokens of prompts are summed too, at the first exit.
        lead: tokens at the beginning of prompts that are not: they will run at full depth.
        on_progress: told how many rows are done, and of how many.
    """
    collector, done = _Collector(model, exit_layers, prompt_bridge, lead), 0
    for forced in forced_passes(model, rows):
        collector.add(forced)
        done += len(forced.rows)
        if on_progress is not None:
            on_progress(done, len(rows))
    return collector.collected()
