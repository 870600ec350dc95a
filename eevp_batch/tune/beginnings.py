"""The beginning that all prompts of a job share, computed once for all passes over its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from eevp_batch.engine.filled_prefix import fill_prefix
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.prefixes import num_common
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ShortPrompt

WORTHWHILE_TOKENS = 32


def num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts have in common; one prompt alone shares none."""
    first = numpy.array(prompts[0])
    others = [num_common(first, numpy.array(ids)) for ids in prompts[1:]]
    return min(others, default=0)


class Beginning:
    """Leading tokens that every prompt has, held in a pool; none where that saves little.

    Args:
        prompts: token ids of each.
        tail: tokens at the end of a prompt that are its own, however alike prompts are.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], tail: int = 1) -> None:
        length = min(num_shared(prompts), min(map(len, prompts)) - tail)
        self.length = length if length >= WORTHWHILE_TOKENS else 0
        self._token_ids = [*prompts[0][: self.length + 1]]
        self.pages: list[int] = []

    def fill(
        self, model: SegmentedModel, pool: KvPool, short_prompt: ShortPrompt | None = None
    ) -> None:
        """Compute it at every depth; `pages` then hold it, for the life of the pool.

        Args:
            model: cut as the rows will run.
            pool: with room for it.
            short_prompt: how prompts are cut short; None: they are not.
        """
        if self.length:
            num_run = self.length + (1 if short_prompt else 0)
            token_ids = self._token_ids[:num_run]
            self.pages = fill_prefix(model, pool, token_ids, self.length, short_prompt).pages
