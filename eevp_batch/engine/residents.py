"""Who is in memory: arrivals are admitted, grow, and start again where it runs out.

Knows pages, seats and prefixes. A resident sequence always stands in a queue or in the batch at
hand.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

import torch

from eevp_batch.engine.depth_queues import DepthQueues
from eevp_batch.engine.filled_prefix import fill_prefix
from eevp_batch.engine.limits import Limits
from eevp_batch.engine.prefixes import LOOK_AHEAD, Prefixes
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Sequence, ShortPrompt
from eevp_batch.engine.shortage import is_out_of_memory, release_cached
from eevp_batch.engine.stats import EngineStats
from eevp_batch.errors import PromptTooLongError, RowTooLargeError

EXPECT_AFTER = 32
"""Finished generations after which their mean length tells how much memory the next will need."""
EXPECT_MARGIN = 1.5
GROW_AFTER = 256
"""Steps without a shortage of memory after which a batch that was halved may double again."""


class Watch(Protocol):
    """Tells the exits which ids a seat begins with."""

    def __call__(self, seat: int, token_ids: list[int], *, start: bool) -> None:
        """See `ExitRule.watch`."""


class Residents:
    """The sequences that wait for memory, and those that have it.

    Args:
        model: fills shared prefixes.
        queues: where a sequence stands once it is resident.
        stats: what is counted.
        limits: what fits.
        max_new_tokens: most tokens of a generation.
        watch: called for each sequence that gets a seat.
        short_prompt: how much of a prompt runs no further than the first exit; None: nothing.

    Attributes:
        arrivals: who waits for memory, in order.
        pool: keys and values.
        prefixes: beginnings that several prompts share.
        max_resident: most sequences in memory.
    """

    def __init__(
        self,
        model: SegmentedModel,
        queues: DepthQueues[Sequence],
        stats: EngineStats,
        limits: Limits,
        max_new_tokens: int,
        watch: Watch,
        short_prompt: ShortPrompt | None = None,
    ) -> None:
        self._model, self._queues, self._stats, self._watch = model, queues, stats, watch
        self._shares_prefixes, self._max_new_tokens = limits.shares_prefixes, max_new_tokens
        self._short_prompt = short_prompt
        self.pool = model.make_pool(limits.num_pages, limits.max_resident, limits.max_pages)
        self.prefixes = Prefixes(self.pool)
        self.arrivals: deque[Sequence] = deque()
        self.max_resident = limits.max_resident
        self._step_tokens = limits.step_tokens
        self._entering = 0  # prompt tokens that wait for the first segment
        self._limits = limits
        self._calm_steps, self._grow_after, self._has_grown = 0, GROW_AFTER, False
        self._by_seat: dict[int, Sequence] = {}  # the last admitted one last

    @property
    def num_free_seats(self) -> int:
        """Sequences that may still become resident."""
        return min(self.pool.num_free_seats, self.max_resident - len(self._by_seat))

    def admit(self) -> list[tuple[Sequence, PromptTooLongError]]:
        """Make arrivals resident while they fit; returns those that never will.

        Prompts come in a few at a time, so that the next run of the first segment has `step_tokens`
        rows: more would hold up those who are generating already and make a row no cheaper.
        """
        self._recover()
        refused: list[tuple[Sequence, PromptTooLongError]] = []
        if not self._queues.lengths[0]:  # those that came in may have started again or be given up
            self._entering = 0
        while self.arrivals and self._entering + self._queues.lengths[0] < self._step_tokens:
            sequence = self.arrivals[0]
            if not self.pool.can_ever_hold(sequence):
                error = PromptTooLongError(
                    f"{sequence.num_prompt} prompt tokens and {sequence.max_new_tokens} new ones "
                    f"do not fit the {self.pool.max_positions} that keys and values have room for"
                )
                refused.append((self.arrivals.popleft(), error))
            elif self._seat(sequence):
                self.arrivals.popleft()
                self._entering += sequence.num_prompt - sequence.filled[0]
            else:
                break
        return refused

    def entered(self) -> None:
        """The first segment runs: who was admitted is on the way."""
        self._entering = 0

    def __len__(self) -> int:
        """Sequences in memory."""
        return len(self._by_seat)

    def grow(
        self, sequences: list[Sequence], running: Collection[Sequence] = ()
    ) -> list[Sequence] | None:
        """Allocate pages up to the fronts; where they run out, the youngest residents start again.

        The oldest resident is never the one to go while there is another, so somebody always gets
        on; who starts again comes out the same, only later.

        Args:
            sequences: the batch at hand.
            running: sequences of other batches, which are on a device now and cannot start again.

        Returns:
            Those of the batch that are still resident. None where one that is running would have to
            go: try again when it is back.
        """
        self._calm_steps += 1
        for sequence in sequences:
            while sequence.seat >= 0 and not self.pool.grow(sequence):
                if self.prefixes.evict():
                    continue
                youngest = next(reversed(self._by_seat.values()))
                if youngest in running:
                    return None
                self._restart(youngest)
        return [sequence for sequence in sequences if sequence.seat >= 0]

    def make_do(
        self, sequences: list[Sequence], cost: int, device: torch.device
    ) -> list[tuple[Sequence, RowTooLargeError]]:
        """Go on after memory ran out in a run, with half as much at a time for some time.

        The batch starts again, for nobody knows how far the run got; who starts again comes out the
        same. A sequence that ran alone is tried once more; those are returned that ran alone twice.

        Args:
            sequences: the batch.
            cost: packed tokens that it brought.
            device: whose memory it was.
        """
        self._stats.shortages += 1
        self._grow_after *= 2 if self._has_grown else 1
        self._calm_steps, self._has_grown = 0, False
        release_cached(device)
        if len(sequences) == 1:
            (sequence,) = sequences
            sequence.shortages_alone += 1
            if sequence.shortages_alone > 1:
                error = RowTooLargeError(
                    f"memory ran out at {len(sequence.token_ids)} tokens although the row ran alone"
                )
                self.leave(sequence)
                return [(sequence, error)]
        else:
            queues = self._queues
            queues.max_batch = len(sequences) // 2
            queues.full_batch = min(queues.full_batch, queues.max_batch)
            queues.max_tokens = max(1, min(queues.max_tokens, cost) // 2)
            self._step_tokens = min(self._step_tokens, queues.max_tokens)
            self.max_resident = max(1, self.max_resident // 2)
        for sequence in reversed(sequences):
            self._restart(sequence)
        return []

    def give_up(self, tag: int) -> int:
        """Drop the sequences with this tag, resident or not; how many there were."""
        resident = [s for s in self._by_seat.values() if s.prompt.tag == tag]
        for sequence in resident:
            self._queues.remove(sequence)
            self.leave(sequence)
            self._discount(sequence)
        waiting = [s for s in self.arrivals if s.prompt.tag == tag]
        for sequence in waiting:
            self.arrivals.remove(sequence)
        return len(resident) + len(waiting)

    def leave(self, sequence: Sequence) -> None:
        """Take back what a resident sequence holds."""
        del self._by_seat[sequence.seat]
        self.pool.release(sequence)

    def taint(self, sequence: Sequence) -> None:
        """See `KvPool.taint`; a shared prefix may be why this row's scores are not finite."""
        self.pool.taint(sequence.pages)
        self.prefixes.taint()

    def _seat(self, sequence: Sequence) -> bool:
        """Make a sequence resident, with the prefix that it shares; False when it does not fit."""
        if self.num_free_seats <= 0:
            return False
        if self._shares_prefixes:
            waiting = list(itertools.islice(self.arrivals, 1, 1 + LOOK_AHEAD))
            self._make_prefix(sequence, self.prefixes.worth_making(sequence, waiting))
        expected = sequence.num_prompt + self._expected_new - 1
        shared, num_shared = self.prefixes.best(sequence)
        while not self.pool.can_admit(expected, num_shared):
            if not self.prefixes.evict():
                return False
            shared, num_shared = self.prefixes.best(sequence)
        self.pool.admit(sequence, expected, shared, num_shared)
        self._stats.shared_tokens += num_shared
        self._by_seat[sequence.seat] = sequence
        if sequence.admitted_s is None:
            sequence.admitted_s = time.monotonic()
            timeout_s = sequence.prompt.timeout_s
            sequence.deadline_s = sequence.admitted_s + (
                math.inf if timeout_s is None else timeout_s
            )
        self._watch(sequence.seat, sequence.token_ids, start=True)
        self._queues.push(0, sequence)
        return True

    @property
    def _expected_new(self) -> int:
        """Tokens to promise memory for: what generations so far had, with a margin."""
        if self._stats.finished < EXPECT_AFTER:
            return self._max_new_tokens
        mean = self._stats.tokens / self._stats.finished
        return min(self._max_new_tokens, math.ceil(EXPECT_MARGIN * mean) + self.pool.page_size)

    def _make_prefix(self, sequence: Sequence, length: int) -> None:
        """Compute the first `length` tokens of a prompt at every depth and keep them."""
        if not length or not self.prefixes.has_room:
            return
        num_run = length + 1 if self._short_prompt else length
        shared, num_shared = self.prefixes.best(sequence)
        if not self.pool.can_admit(num_run, num_shared):
            return
        token_ids = sequence.token_ids[:num_run]
        try:
            filled = fill_prefix(
                self._model, self.pool, token_ids, length, self._short_prompt, shared, num_shared
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._shares_prefixes = False  # prompts run a few at a time, a prefix all at once
            self._stats.shortages += 1
            return
        self._stats.packed_tokens += filled.num_packed
        self.prefixes.keep(token_ids[:length], filled.pages)

    def _restart(self, sequence: Sequence) -> None:
        """Send a resident sequence back to its prompt and to the head of the arrivals."""
        self._queues.remove(sequence)
        self.leave(sequence)
        self._discount(sequence)
        self._stats.restarts += 1
        sequence.restart()
        self.arrivals.appendleft(sequence)

    def _recover(self) -> None:
        """Allow twice as much at a time, some time after memory ran out, until all is as before.

        It takes twice as many steps each time that this turns out too early, so that a memory that
        stays short costs ever less.
        """
        queues, limits = self._queues, self._limits
        now = (queues.max_batch, queues.max_tokens, self.max_resident)
        is_whole = now == (limits.max_batch, limits.max_tokens, limits.max_resident)
        if is_whole or self._calm_steps < self._grow_after:
            return
        self._calm_steps, self._has_grown = 0, True
        queues.max_batch = min(limits.max_batch, 2 * queues.max_batch)
        queues.full_batch = min(limits.full_batch, queues.max_batch)
        queues.max_tokens = min(limits.max_tokens, 2 * queues.max_tokens)
        self._step_tokens = min(limits.step_tokens, queues.max_tokens)
        self.max_resident = min(limits.max_resident, 2 * self.max_resident)

    def _discount(self, sequence: Sequence) -> None:
        """Count the tokens of a sequence that is not finished out again."""
        self._stats.discount(sequence.exits[: len(sequence.exits) - sequence.num_drafts])
