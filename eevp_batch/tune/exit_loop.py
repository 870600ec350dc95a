"""Exits in the loop: known text through a model that is trained, tokens leaving as in the engine.

One parallel pass. After an exit layer the tokens whose exit is sure stop, `h = where(exited, h,
layer(h))`; what deeper layers see of them are keys and values from bridges, and gradients flow
through these as well. Rows lie side by side behind the beginning that they share. What leaves is
not computed any further, so that an early exit makes a pass cheaper, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

from eevp_batch.engine.fitted import Bridge, bridge_input, unit_state
from eevp_batch.engine.module_layers import turned_keys
from eevp_batch.engine.score_summary import ScoreSummary, summarise
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind, ShortPrompt
from eevp_batch.tune.head_training import WhitenedHead, float_normed, kl_of_scores
from eevp_batch.tune.heads import Targets
from eevp_batch.tune.states import Row

ATTENTION_NAME = "eevp_exit_loop"
SHARED = -1
"""Owner of the tokens that all rows share."""
_SCORED = 256  # rows whose scores are made at a time


@dataclass(frozen=True, slots=True)
class LoopPack:
    """Some rows side by side; N tokens, R rows, S deciding tokens.

    Attributes:
        token_ids: [N].
        positions: [N] each in its own row.
        owners: [N] 0..R-1, or `SHARED`.
        previous: [N] place of the token before; the first token's is its own.
        may_leave: [N] bool, fed tokens that were generated.
        may_stop: [N] bool, prompt tokens that a short prompt does not run to the end.
        starts: [N] bool, the first of those of a row.
        deciding: [S] places whose next token was generated.
        targets: of these.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    owners: torch.Tensor
    previous: torch.Tensor
    may_leave: torch.Tensor
    may_stop: torch.Tensor
    starts: torch.Tensor
    deciding: torch.Tensor
    targets: Targets

    @classmethod
    def of(
        cls, rows: Sequence[Row], targets: Targets, short: ShortPrompt, num_shared: int
    ) -> LoopPack:
        """Lay rows out.

        Args:
            rows: one or more.
            targets: of their generated tokens, row after row.
            short: which prompt tokens may stop at the first exit.
            num_shared: tokens that all rows begin with.
        """
        columns: list[tuple[int, ...]] = []
        for position, token_id in enumerate(rows[0].prompt_ids[:num_shared]):
            columns.append((token_id, position, SHARED, max(0, position - 1), 0, 0, 0))
        deciding: list[int] = []
        for owner, row in enumerate(rows):
            num_prompt, skipped = len(row.prompt_ids), short.skipped(len(row.prompt_ids))
            for position in range(num_shared, len(row.fed_ids)):
                place = len(columns)
                before = num_shared if position == num_shared else place
                stops = position in skipped
                starts = stops and position == skipped.start
                generated = position >= num_prompt
                kinds = (int(generated), int(stops), int(starts))
                columns.append((row.fed_ids[position], position, owner, max(0, before - 1), *kinds))
                if position >= num_prompt - 1:
                    deciding.append(place)
        device = targets.ids.device
        table = torch.tensor(columns, dtype=torch.int64, device=device).T
        ids, at, owners, previous, leave, stop, start = table.unbind()
        places = torch.tensor(deciding, dtype=torch.int64, device=device)
        flags = (leave.bool(), stop.bool(), start.bool())
        return cls(ids, at, owners, previous, *flags, places, targets)


@dataclass(frozen=True, slots=True)
class Said:
    """What one exit, or the last layer, made of the tokens that came to it.

    Attributes:
        layer: 1..L.
        loss: sum over them of the KL from the targets, in nats.
        surrogate: scalar whose gradient is that of `loss`.
        right: how many made the targets' choice.
        count: how many they were.
    """

    layer: int
    loss: float
    surrogate: torch.Tensor
    right: int
    count: int


class _Stopped:
    """Tokens that stopped at one exit, and what their bridge reads of them."""

    def __init__(self, places: torch.Tensor, inputs: torch.Tensor, bridge: Bridge) -> None:
        self.places, self._bridge = places, bridge
        self._inputs = inputs  # [W, in] or [W, r], of the model's type

    @classmethod
    def at(
        cls, places: torch.Tensor, unit: torch.Tensor, previous: torch.Tensor, bridge: Bridge
    ) -> _Stopped:
        """Of unit states [W, E], and those of the tokens before after the first exit."""
        if bridge.lift is not None:
            lift = bridge.lift.to(unit.dtype)
            unit = bridge_input(unit, previous, linear(unit, lift))
        if bridge.down is not None:
            unit = linear(unit, bridge.down.to(unit.dtype))
        return cls(places, unit, bridge)

    def keys_values(self, layer: int) -> torch.Tensor:
        """[W, 2 * num_kv_heads * D] of layer 1..L, before key norm and rotary."""
        return self._bridge.layers[layer](self._inputs)


class _Running:
    """The tokens of a pack that still run, and the keys and values of those that do not.

    Args:
        pack: all of them.
        rotary: cosines and sines [1, N, D].
    """

    def __init__(self, pack: LoopPack, rotary: tuple[torch.Tensor, ...]) -> None:
        self._pack, self._rotary = pack, rotary
        self.places = torch.arange(len(pack.token_ids), device=pack.token_ids.device)  # [M]
        self._stopped: list[_Stopped] = []
        self._masks: dict[int | None, torch.Tensor] = {}

    def angles(self, places: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of the tokens that run, or of others."""
        chosen = self.places if places is None else places
        return tuple(part[:, chosen] for part in self._rotary)

    def stop(self, some: Sequence[_Stopped], stays: torch.Tensor) -> None:
        """Go on with those that stay, [M] bool."""
        self._stopped += some
        self.places = self.places[stays]
        self._masks.clear()

    def complete(
        self, attention: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, num_kv_heads, M, D] of those that run, with those of the others."""
        keys, values = [key], [value]
        for some in self._stopped:
            both = some.keys_values(attention.layer_idx + 1)
            by_head = both.view(len(both), 2, key.shape[1], -1)
            turned = turned_keys(attention, by_head[:, 0], self.angles(some.places))
            keys.append(turned.to(value.dtype))
            values.append(by_head[:, 1].transpose(0, 1)[None])
        return torch.cat(keys, 2), torch.cat(values, 2)

    def mask(self, window: int | None) -> torch.Tensor:
        """[M, N] bool, who may look at whom; the others come last, as in `complete`."""
        if window not in self._masks:
            pack, rows = self._pack, self.places
            columns = torch.cat([rows, *(some.places for some in self._stopped)])
            owners, others = pack.owners[rows][:, None], pack.owners[columns]
            back = pack.positions[rows][:, None] - pack.positions[columns]
            allowed = ((others == owners) | (others == SHARED)) & (back >= 0)
            self._masks[window] = allowed if window is None else allowed & (back < window)
        return self._masks[window]


def loop_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    running: _Running,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the tokens that run and to those that stopped.

    Args:
        module: the model's attention module.
        query: [1, H, M, D], rotated in float32.
        key: [1, num_kv_heads, M, D], likewise.
        value: [1, num_kv_heads, M, D] of the model's type.
        attention_mask: unused.
        running: of the pack.
        scaling: factor on the scores.
        sliding_window: positions that a token may look back, itself included.

    Returns:
        [1, M, H, D] and None (no attention weights).
    """
    keys, values = running.complete(module, key.to(value.dtype), value)
    groups = query.shape[1] // keys.shape[1]
    out = scaled_dot_product_attention(
        query.to(value.dtype),
        keys.repeat_interleave(groups, 1),
        values.repeat_interleave(groups, 1),
        attn_mask=running.mask(sliding_window),
        scale=scaling,
    )
    return out.transpose(1, 2), None


class ExitLoop:
    """Runs packs through a model that is trained.

    Args:
        model: the original, whose norm and LM head stay as they are.
        body: the decoder that is trained, in memory; its attention is set to this module's.
        heads: by exit layer.
        bridges: as in `FittedExits`; prompts stop where there is one for them.
    """

    def __init__(
        self,
        model: SegmentedModel,
        body: Any,
        heads: Mapping[int, WhitenedHead],
        bridges: Mapping[tuple[Kind, int], Bridge],
    ) -> None:
        self._model, self._body = model, body
        self._heads, self._bridges = heads, bridges
        self._first = min(heads)
        self._dtype = body.embed_tokens.weight.dtype  # of its products
        body.config._attn_implementation = ATTENTION_NAME

    def run(self, pack: LoopPack, bars: torch.Tensor, is_short: torch.Tensor) -> Iterator[Said]:
        """What each exit says of the tokens that come to it, and then the last layer.

        Args:
            pack: rows.
            bars: [R] threshold of each row; above 1 it has no exits.
            is_short: [R] bool, whether its prompt stops at the first exit.
        """
        hidden = self._body.embed_tokens(pack.token_ids).float()  # [N, E]
        running = _Running(pack, self._body.rotary_emb(hidden[None], pack.positions[None]))
        first = hidden
        for number, layer in enumerate(self._body.layers, 1):
            out = layer(hidden[None], position_embeddings=running.angles(), running=running)
            hidden = out[0]  # [M, E]
            if number == self._model.num_layers:
                yield self._said(number, pack, running, hidden)[0]
            elif number in self._heads:
                units = unit_state(hidden, self._model.norm_eps)
                first = units if number == self._first else first
                said, sure = self._said(number, pack, running, units, bars)
                yield said
                stops = is_short[pack.owners[running.places]] & pack.may_stop[running.places]
                kinds: dict[Kind, torch.Tensor] = {"generated": sure}
                if ("prompt", number) in self._bridges:
                    kinds["prompt"] = stops
                hidden = self._stop(number, pack, running, kinds, units, first, hidden)

    def _said(
        self,
        number: int,
        pack: LoopPack,
        running: _Running,
        states: torch.Tensor,
        bars: torch.Tensor | None = None,
    ) -> tuple[Said, torch.Tensor]:
        """What is said of the deciding tokens among [M, E] states; who leaves, [M] bool."""
        at = torch.full_like(pack.token_ids, -1)
        at[running.places] = torch.arange(len(running.places), device=at.device)
        reached = (at[pack.deciding] >= 0).nonzero()[:, 0]  # numbers of deciding tokens
        places = at[pack.deciding[reached]]
        if bars is None:
            normed = float_normed(self._model, states[places])
        else:
            normed = self._heads[number].normed(self._model, states[places])
        losses, right, parts, margins = 0.0, 0, [], []
        for rows, numbers in zip(
            torch.split(normed, _SCORED), torch.split(reached, _SCORED), strict=True
        ):
            loss, gradient, found = self._scored(rows, pack.targets, numbers)
            losses += loss * len(rows)
            parts.append((rows * gradient).sum())
            right += int((found.column == pack.targets.best_ids[numbers]).sum())
            margins.append((found.best - found.lse).exp() - (found.second - found.lse).exp())
        leaves = torch.zeros_like(running.places, dtype=torch.bool)
        if bars is not None:
            sure = torch.cat(margins) > bars[pack.owners[running.places[places]]]
            leaves[places[sure]] = True
            leaves &= pack.may_leave[running.places]
        return Said(number, losses, torch.stack(parts).sum(), right, len(reached)), leaves

    @torch.no_grad()
    def _scored(
        self, normed: torch.Tensor, targets: Targets, numbers: torch.Tensor
    ) -> tuple[float, torch.Tensor, ScoreSummary]:
        """Mean loss of some tokens, the gradient of its sum, and what else their scores say."""
        scores = self._model.scores(normed.to(self._model.dtype))
        wanted = (targets.ids[numbers], targets.probabilities[numbers])
        return *kl_of_scores(self._model, scores, *wanted), summarise(scores)

    def _stop(
        self,
        number: int,
        pack: LoopPack,
        running: _Running,
        kinds: Mapping[Kind, torch.Tensor],
        units: torch.Tensor,
        first: torch.Tensor,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Stop the tokens of each kind, [M] bool; the states of the others."""
        stays, stopped = torch.ones_like(running.places, dtype=torch.bool), []
        for kind, stops in kinds.items():
            places = running.places[stops]
            if not len(places):
                continue
            before = first[pack.previous[places]].masked_fill(pack.starts[places, None], 0.0)
            states = (units[stops].to(self._dtype), before.to(self._dtype))
            stopped.append(_Stopped.at(places, *states, self._bridges[kind, number]))
            stays &= ~stops
        running.stop(stopped, stays)
        return hidden[stays]


AttentionInterface.register(ATTENTION_NAME, loop_attention)
