"""One pass over some rows, and all that the fits need of it: sums for bridges, states for heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from eevp_batch.engine.fitted import bridge_input, unit_state
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind
from eevp_batch.tune.heads import Targets, Taught, last_choices, teach
from eevp_batch.tune.regression import NormalEquations, RowSums
from eevp_batch.tune.states import ForcedPass, Row, forced_passes


@dataclass(frozen=True, slots=True)
class Collected:
    """What one pass over some rows leaves.

    Attributes:
        bridges: sums by kind of token and exit layer, one target per layer behind the exit.
        heads: sums by exit layer; the target, named by the last layer, is the change of the unit
            state up to there.
        taught: deciding tokens by exit layer, for the heads.
        owners: [S] number of the row of each of them.
        lift: [R, E] of the bridges' inputs; None: they are unit states alone. See `Bridge`.
    """

    bridges: Mapping[tuple[Kind, int], NormalEquations]
    heads: Mapping[int, NormalEquations]
    taught: Mapping[int, Taught]
    owners: torch.Tensor
    lift: torch.Tensor | None = None

    def __add__(self, other: Collected) -> Collected:
        num_rows = int(self.owners.max()) + 1
        return Collected(
            {origin: sums + other.bridges[origin] for origin, sums in self.bridges.items()},
            {e: sums + other.heads[e] for e, sums in self.heads.items()},
            {e: tokens + other.taught[e] for e, tokens in self.taught.items()},
            torch.cat([self.owners, num_rows + other.owners]),
            self.lift,
        )

    @property
    def targets(self) -> Targets:
        """What the heads are taught, row after row, for a model that is to say the same."""
        order = self.owners.argsort(stable=True)
        taught = next(iter(self.taught.values()))
        counts = torch.bincount(self.owners).tolist()
        return Targets(
            taught.best_ids[order],
            taught.ids[order],
            taught.probabilities[order],
            [0, *accumulate(counts)],
        )


def draw_lift(model: SegmentedModel, size: int) -> torch.Tensor | None:
    """Directions [R, E] of the bridges' lift, the same in every pass.

    Args:
        model: whose states are lifted.
        size: R; 0: no lift.
    """
    draws = torch.randn(size, model.hidden_size, generator=torch.Generator().manual_seed(0))
    lift = draws.to(model.dtype) / model.hidden_size**0.5  # so that the products are of size 1
    return lift.to(model.device) if size else None


class _Picked(NamedTuple):
    """Some tokens of a pack.

    Attributes:
        places: [P] their rows.
        starts: [P] whether no token before them is looked at.
    """

    places: torch.Tensor
    starts: torch.Tensor


class _Collector:
    """Adds passes up."""

    def __init__(
        self,
        model: SegmentedModel,
        exit_layers: Sequence[int],
        prompt_bridge: bool,
        lead: int,
        lift: torch.Tensor | None,
        targets: Targets | None,
    ) -> None:
        self._model, self._exits, self._lead = model, list(exit_layers), lead
        self._lift, self._targets = lift, targets
        origins: list[tuple[Kind, int]] = [("generated", e) for e in self._exits]
        if prompt_bridge:
            origins.append(("prompt", self._exits[0]))

        width = model.hidden_size
        num_inputs = width if lift is None else 2 * width + len(lift)
        self._bridges = {origin: RowSums(num_inputs, model.device) for origin in origins}
        self._heads = {e: RowSums(width, model.device) for e in self._exits}
        self._units: dict[int, list[torch.Tensor]] = {e: [] for e in self._exits}
        self._taught: list[tuple[torch.Tensor, ...]] = []
        self._owners: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._seen: set[int] = set()

    def add(self, forced: ForcedPass) -> None:
        """One pass."""
        last = self._model.num_layers
        inputs: dict[tuple[Kind, int], torch.Tensor] = {}
        rows: dict[Kind, _Picked] = {
            "generated": _Picked(forced.generated, forced.generated < 0),
            "prompt": self._unseen(forced),
        }
        first = torch.empty(0)
        for layer, hidden in forced.layers():
            if layer in self._exits:
                units = unit_state(hidden, self._model.norm_eps)
                first = units if layer == self._exits[0] else first
                self._units[layer].append(units[forced.deciding])
                for origin in self._bridges:
                    if origin[1] == layer:
                        found = self._inputs(units, first, rows[origin[0]])
                        inputs[origin] = self._bridges[origin].block(found)
                        self._bridges[origin].add_inputs(inputs[origin])
            if layer == last:
                self._teach(forced, hidden[forced.deciding])
            elif inputs:
                values = self._model.layers.kv_of(layer, hidden)
                for origin, block in inputs.items():
                    picked = values[rows[origin[0]].places]
                    self._bridges[origin].add_target(layer + 1, block, picked)

    def _inputs(self, units: torch.Tensor, first: torch.Tensor, rows: _Picked) -> torch.Tensor:
        """What bridges read of some tokens."""
        picked = units[rows.places]
        if self._lift is None:
            return picked
        previous = first[rows.places - 1].masked_fill(rows.starts[:, None], 0.0)
        return bridge_input(picked, previous, picked @ self._lift.float().T)

    def _unseen(self, forced: ForcedPass) -> _Picked:
        """Prompt tokens behind the lead whose beginning no earlier row shared.

        A shared beginning has the same states in every row; counted each time, a long template
        would drown what differs.
        """
        unseen: list[int] = []
        starts: list[bool] = []
        places = iter(forced.prompt.tolist())
        for row in forced.rows:
            beginning = 0
            for position, token_id in enumerate(row.prompt_ids):
                beginning = hash((beginning, token_id))
                if position < forced.num_shared:
                    continue
                place = next(places)
                # Of the first token in the pack the one before may be in an earlier pack.
                is_start = position == self._lead
                has_previous = self._lift is None or position > forced.num_shared
                if position < self._lead or beginning in self._seen:
                    continue
                if is_start or has_previous:
                    self._seen.add(beginning)
                    unseen.append(place)
                    starts.append(is_start)
        device = self._model.device
        return _Picked(
            torch.tensor(unseen, dtype=torch.int64, device=device),
            torch.tensor(starts, dtype=torch.bool, device=device),
        )

    def _teach(self, forced: ForcedPass, hidden: torch.Tensor) -> None:
        self._owners.append(forced.owners)
        if self._targets is None:
            self._taught.append(teach(self._model, hidden))
        else:
            given = self._targets.of(forced.row_numbers)
            self._taught.append((given.best_ids, given.ids, given.probabilities))
            self._kept.append(last_choices(self._model, hidden) == given.best_ids)
        goal = unit_state(hidden, self._model.norm_eps)
        for e, sums in self._heads.items():
            units = self._units[e][-1]
            block = sums.block(units)
            sums.add_inputs(block)
            sums.add_target(self._model.num_layers, block, goal - units)

    def collected(self) -> Collected:
        """All of it."""
        best, ids, probabilities = (torch.cat(column) for column in zip(*self._taught, strict=True))
        kept = torch.cat(self._kept) if self._kept else None
        taught = {
            e: Taught(torch.cat(units), best, ids, probabilities, kept)
            for e, units in self._units.items()
        }
        bridges = {origin: sums.total() for origin, sums in self._bridges.items()}
        heads = {e: sums.total() for e, sums in self._heads.items()}
        return Collected(bridges, heads, taught, torch.cat(self._owners), self._lift)


@torch.no_grad()
def collect(
    model: SegmentedModel,
    rows: Sequence[Row],
    exit_layers: Sequence[int],
    prompt_bridge: bool = True,
    lead: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    lift: int = 0,
    targets: Targets | None = None,
) -> Collected:
    """Run rows through all layers and keep what the fits need.

    Args:
        model: cut anywhere.
        rows: one or more.
        exit_layers: increasing, the last layer apart.
        prompt_bridge: whether tokens of prompts are summed too, at the first exit.
        lead: tokens at the beginning of prompts that are not: they will run at full depth.
        on_progress: told how many rows are done, and of how many.
        lift: R, features that bridges read besides, see `Bridge`; 0: they read states alone.
        targets: of the rows, what the heads are taught; None: what this model itself says.
    """
    wanted = (exit_layers, prompt_bridge, lead, draw_lift(model, lift), targets)
    collector, done = _Collector(model, *wanted), 0
    for forced in forced_passes(model, rows):
        collector.add(forced)
        done += len(forced.rows)
        if on_progress is not None:
            on_progress(done, len(rows))
    return collector.collected()
