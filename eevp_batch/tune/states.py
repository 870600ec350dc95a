"""Rows whose tokens are known, run once through all layers, with the states after each layer.

The layers are those that a job runs, kernels included, so that what is fitted here is fitted to the
numbers that the engine will see. Knows rows and states, nothing of what is fitted to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import PackedTokens, pack
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Sequence as Generation
from eevp_batch.records import Prompt
from eevp_batch.tune.beginnings import Beginning

PASS_TOKENS = 2048
"""Tokens of a pass: enough for full-speed products, few enough for their states to stay small."""


def prompt_key(token_ids: Sequence[int]) -> str:
    """12 hex digits that tell prompts apart."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and what the model made of it at full depth.

    Attributes:
        prompt_ids: [T], T >= 1.
        generated_ids: [G], G >= 1; the last one is never fed.
    """

    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]

    @property
    def fed_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.generated_ids[:-1]]


@dataclass(frozen=True)
class ForcedPass:
    """Some rows, packed; the token positions below number the pack's N tokens.

    Attributes:
        rows: the rows in the pack.
        row_numbers: their numbers in the list that was given.
        num_shared: leading tokens of every row that are not in the pack; an earlier one had them.
        prompt: [P] positions that hold a token of a prompt.
        generated: [G] positions that hold a generated token.
        deciding: [S] positions whose next token was generated, row by row.
        next_ids: [S] those tokens.
        owners: [S] number of the row of each, as in `row_numbers`.
    """

    rows: Sequence[Row]
    row_numbers: Sequence[int]
    num_shared: int
    prompt: torch.Tensor
    generated: torch.Tensor
    deciding: torch.Tensor
    next_ids: torch.Tensor
    owners: torch.Tensor
    _model: SegmentedModel
    _tokens: PackedTokens
    _pool: KvPool

    @torch.no_grad()
    def layers(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each layer, 1..L, and the states [N, E] after it. To be read before the next pass."""
        tokens = self._tokens
        for depth in range(self._model.num_segments):
            states = self._model.run_segment(depth, tokens, self._pool)
            yield depth + 1, states.hidden
            tokens = replace(tokens, token_ids=None)


def forced_passes(
    model: SegmentedModel, rows: Sequence[Row], pass_tokens: int = PASS_TOKENS
) -> Iterator[ForcedPass]:
    """Passes over all rows, a few rows each.

    Args:
        model: cut anywhere; its layers are used one by one.
        rows: in any order; rows of like length share a pass.
        pass_tokens: tokens of a pass; a longer row has one for itself.
    """
    if not rows:
        return
    model = model.recut(range(1, model.num_layers + 1))
    beginning = Beginning([row.prompt_ids for row in rows])
    groups = row_groups(rows, pass_tokens, beginning.length)
    pool = pool_for(model, rows, groups, beginning.length)
    if beginning.length:  # once as part of a row, so that its states are seen as well
        yield from _pass(model, pool, rows, groups[0][:1], None)
        beginning.fill(model, pool)
        groups[0] = groups[0][1:]
    for group in groups:
        if group:
            yield from _pass(model, pool, rows, group, beginning)


def pool_for(
    model: SegmentedModel, rows: Sequence[Row], groups: Sequence[Sequence[int]], num_shared: int
) -> KvPool:
    """A pool that holds the largest group of rows, and the beginning that they share."""
    size = model.layers.page_size

    def pages(count: int) -> int:
        return -(-count // size)

    most = max(sum(pages(len(rows[number].fed_ids)) for number in group) for group in groups)
    num_pages = most + pages(num_shared + 1)
    return model.make_pool(num_pages, max(map(len, groups)), num_pages)


def row_groups(rows: Sequence[Row], pass_tokens: int, num_shared: int = 0) -> list[list[int]]:
    """Numbers of the rows that share a pass; short rows first, so that single tokens lead.

    Args:
        rows: in any order.
        pass_tokens: tokens of a pass; a longer row has one for itself.
        num_shared: leading tokens of every row that do not run.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].fed_ids))
    return list(filled(rows, order, pass_tokens, num_shared))


def filled(
    rows: Sequence[Row], order: Iterable[int], pass_tokens: int, num_shared: int
) -> Iterator[list[int]]:
    """Numbers of rows in this order, as many together as the next one leaves room for.

    Args:
        rows: by number.
        order: their numbers.
        pass_tokens: tokens of each group; a longer row has one for itself.
        num_shared: leading tokens of every row that do not run.
    """
    group: list[int] = []
    room = pass_tokens
    for number in order:
        cost = len(rows[number].fed_ids) - num_shared
        if group and cost > room:
            yield group
            group, room = [], pass_tokens
        group.append(number)
        room -= cost
    if group:
        yield group


def _pass(
    model: SegmentedModel,
    pool: KvPool,
    rows: Sequence[Row],
    group: list[int],
    beginning: Beginning | None,
) -> Iterator[ForcedPass]:
    """The pass of one group; its pages are given back when the caller comes for the next."""
    sequences = []
    num_shared = beginning.length if beginning else 0
    for number in group:
        fed = Prompt(number, rows[number].fed_ids)
        sequence = Generation(fed, model.num_segments, max_new_tokens=1, seed=0)
        pages = beginning.pages if beginning else []
        pool.admit(sequence, sequence.num_prompt, pages, num_shared)
        pool.grow(sequence)
        sequences.append(sequence)
    packed = pack(sequences, 0, pool, model.layers.padding)
    device = model.device
    every = torch.arange(packed.num_tokens, device=device)
    prompt: list[int] = []
    generated: list[int] = []
    deciding: list[int] = []
    owners: list[int] = []
    for number, span in zip(group, packed.spans, strict=True):
        border = span.start + len(rows[number].prompt_ids) - num_shared
        prompt += range(span.start, border)
        generated += range(border, span.stop)
        deciding += range(border - 1, span.stop)
        owners += [number] * (span.stop - border + 1)
    next_ids = [token_id for number in group for token_id in rows[number].generated_ids]

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    yield ForcedPass(
        rows=[rows[number] for number in group],
        row_numbers=group,
        num_shared=num_shared,
        prompt=column(prompt),
        generated=column(generated),
        deciding=column(deciding),
        next_ids=column(next_ids),
        owners=column(owners),
        _model=model,
        _tokens=replace(packed, scored_rows=every),
        _pool=pool,
    )
    for sequence in sequences:
        pool.release(sequence)
