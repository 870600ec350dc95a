"""Fills the keys/values of a beginning that prompts share."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import pack
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Sequence, ShortPrompt
from eevp_batch.records import Prompt


class FilledPrefix(NamedTuple):
    """A beginning whose keys/values are there at every depth.

    Attributes:
        pages: that hold them; owned by the caller.
        num_packed: tokens that ran, over all segments.
    """

    pages: list[int]
    num_packed: int


def fill_prefix(
    model: SegmentedModel,
    pool: KvPool,
    token_ids: list[int],
    length: int,
    short_prompt: ShortPrompt | None = None,
    shared: SequenceOf[int] = (),
    num_shared: int = 0,
) -> FilledPrefix:
    """Compute a beginning of prompts at every depth; the caller made sure that it fits.

    Args:
        model: fills it.
        pool: gives the seat of prefixes and the pages.
        token_ids: the beginning; where prompts are cut short, and one token more of any of them,
            for the last token of a prompt always runs.
        length: tokens to keep.
        short_prompt: how prompts are cut short; None: they are not.
        shared: pages of a shorter beginning.
        num_shared: tokens in it.
    """
    short = short_prompt and short_prompt._replace(tail=1)
    prompt = Prompt("", token_ids)
    prefix = Sequence(prompt, model.num_segments, 1, 0, short_prompt=short)
    pool.seat_prefix(prefix, list(shared), num_shared)
    num_packed = 0
    try:
        for depth in range(model.num_segments):
            part = model.part(depth)
            store = pool.stores[model.parts.index(part)]
            with part.run_lock, part.place.current():
                tokens = pack([prefix], depth, store, part.layers.padding)
                part.run_segment(depth, tokens, store)
            prefix.mark_filled(depth)
            num_packed += tokens.num_tokens
    except BaseException:
        pool.drop(pool.unseat_prefix(prefix))
        raise
    pages, num_kept = pool.unseat_prefix(prefix), pool.pages_for(length)
    pool.drop(pages[num_kept:])
    return FilledPrefix(pages[:num_kept], num_packed)
