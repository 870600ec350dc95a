"""One generation in progress: its tokens, how far its keys/values reach, and where it stands.

Knows positions and counts; touches no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal, NamedTuple

from eevp_batch.records import Prompt, TokenExit
from eevp_batch.row_counts import KeptTokens
from eevp_batch.spec import KvPolicy

Kind = Literal["prompt", "generated"]


class Origin(NamedTuple):
    """Where a token stopped: what a bridge is fitted for.

    Attributes:
        kind: whether it is the prompt's or was generated.
        exit_layer: the last layer that it ran.
    """

    kind: Kind
    exit_layer: int


class ShortPrompt(NamedTuple):
    """How a prompt enters under `exit.prefill: bridge`.

    Attributes:
        exit_layer: the first exit layer, the last layer that most of the prompt runs.
        tail: tokens at its end, at least one, that run through all layers.
        lead: tokens at its beginning that do, too: what the prompts of a job share is computed
            once, so that it costs nothing to have it right.
    """

    exit_layer: int
    tail: int
    lead: int = 0

    def skipped(self, num_prompt: int) -> range:
        """Positions of a prompt that run no further than the first exit."""
        return range(self.lead, max(self.lead, num_prompt - self.tail))


class Waiting(NamedTuple):
    """Positions of one sequence that a segment has not seen yet, the front token included.

    Attributes:
        run: positions that go through the segment's layers; the last one is the front token.
        project: positions whose keys/values come from the state they stopped with, by origin.
        scored: the positions of `run`, always its end, whose scores are asked for after the
            segment: the front token, under `verify` after the last layer also the drafts before it.
    """

    run: list[int]
    project: dict[Origin, list[int]]
    scored: range

    @property
    def num_projected(self) -> int:
        """Positions that do not run."""
        return sum(map(len, self.project.values()))


class Settled(NamedTuple):
    """What leaving once has added to the tokens that stand.

    Attributes:
        exits: tokens that no later segment can take back, in order.
        accepted: the leading ones of these that had been drafts.
        rejected: the first draft that the last layer replaced; None where it replaced none.
    """

    exits: list[TokenExit]
    accepted: list[TokenExit]
    rejected: TokenExit | None


class Sequence:
    """One prompt and what has been generated from it.

    The *front* token is the token on its way through the segments: the last one that is fed.
    Positions before it may still be missing from the keys/values of deeper segments: `filled[d]` is
    the number of leading positions that segment d has seen. As it never rises with d, position t
    waits at the first depth d with `filled[d] <= t`, with its state after segment d - 1.

    Under the KV policy `verify` a token that left early is a *draft* until the last layer has
    judged it: it may still be taken back, with everything after it (self-speculation, LayerSkip,
    arXiv 2404.16710, section 4.3).

    Args:
        prompt: what to continue.
        num_segments: D, segments of the model.
        max_new_tokens: generation ends at the latest after so many tokens.
        seed: 64-bit seed of this generation.
        kv: the KV policy.
        max_waiting: under `recompute` and `verify`, tokens that may wait for the last segment.
        short_prompt: how much of the prompt runs no further than the first exit; None: nothing.
    """

    def __init__(
        self,
        prompt: Prompt,
        num_segments: int,
        max_new_tokens: int,
        seed: int,
        kv: KvPolicy = "propagate",
        max_waiting: int = 1,
        short_prompt: ShortPrompt | None = None,
    ) -> None:
        self.prompt = prompt
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self._reruns_waiting = kv in ("recompute", "verify")
        self._verifies = kv == "verify"
        self._max_waiting = max_waiting
        self._short_prompt = short_prompt
        self.token_ids = list(prompt.token_ids)
        self.exits: list[TokenExit] = []
        self.filled = [0] * num_segments
        self.pages: list[int] = []
        self.promised = 0  # pages that it counts on and does not have yet
        self.seat = -1
        self.admitted_s: float | None = None  # monotonic, the first time
        self.deadline_s = math.inf  # monotonic
        self.kept = KeptTokens()
        self.finish_reason: str | None = None
        self.shortages_alone = 0  # how often memory ran out while it ran alone

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def bridged_from(self) -> int:
        """Position where the bridged part of the prompt begins, where it has one."""
        return self._short_prompt.lead if self._short_prompt else 0

    @property
    def num_generated(self) -> int:
        return len(self.exits)

    @property
    def front(self) -> int:
        """Position of the front token; the token that ends a generation is never fed."""
        return len(self.token_ids) - (1 if self.finish_reason is None else 2)

    @property
    def max_positions(self) -> int:
        """Most positions whose keys/values are ever held: the last token is never fed back."""
        return self.num_prompt + self.max_new_tokens - 1

    @property
    def num_waiting(self) -> int:
        """Generated tokens that left before the last segment and that it has not seen yet."""
        return len(self.token_ids) - 1 - self._first_unseen

    @property
    def num_drafts(self) -> int:
        """Tokens at the end that the last layer has still to judge."""
        return self.num_waiting if self._verifies else 0

    @property
    def may_leave(self) -> bool:
        """Whether the front token may leave before the last segment.

        Not once as many tokens wait as may, and not where it only goes on to have an end judged.
        """
        if self.finish_reason is not None:
            return False
        return not self._reruns_waiting or self.num_waiting < self._max_waiting

    @property
    def _first_unseen(self) -> int:
        """The first position whose token the last segment has not yet continued."""
        return max(self.filled[-1], self.num_prompt - 1)

    def waiting(self, depth: int) -> Waiting:
        """What must enter segment `depth` now.

        The KV policies differ in this split and nowhere else in what runs. Prompt tokens run, so
        that a prompt is held at full depth, unless most of it stops at the first exit. A generated
        token that left before this segment is only projected under `propagate` (CALM, section 3.4)
        and `bridge`; under `recompute` and `verify` it runs, so that its keys/values are those of a
        full forward.
        """
        first, front = self.filled[depth], self.front
        skipped = self.skipped if depth else range(0)
        first_left = front
        if not self._reruns_waiting:
            first_left = min(max(first, self.num_prompt), front)
        project: dict[Origin, list[int]] = {}
        if self._short_prompt and first < skipped.stop:
            origin = Origin("prompt", self._short_prompt.exit_layer)
            project[origin] = [*range(max(first, skipped.start), skipped.stop)]
        for position in range(first_left, front):
            exit = self.exits[self.step_of(position)]
            project.setdefault(Origin("generated", exit.exit_layer), []).append(position)
        judges = self._verifies and depth == len(self.filled) - 1
        return Waiting(
            run=[
                *range(first, min(skipped.start, first_left)),
                *range(max(first, skipped.stop), first_left),
                front,
            ],
            project=project,
            scored=range(self._first_unseen if judges else front, front + 1),
        )

    @property
    def skipped(self) -> range:
        """Prompt positions that run no further than the first exit."""
        return self._short_prompt.skipped(self.num_prompt) if self._short_prompt else range(0)

    @property
    def max_shared(self) -> int:
        """Most leading tokens that may come from a prefix: what is the same for every prompt."""
        tail = self._short_prompt.tail if self._short_prompt else 1
        return max(0, self.num_prompt - tail)

    def step_of(self, position: int) -> int:
        """Number, from 0 on, of the generated token that follows the token at `position`."""
        return position - self.num_prompt + 1

    def draft_after(self, position: int) -> int | None:
        """Id of the draft that follows the token at `position`; None behind the last one."""
        is_draft = self.num_drafts > 0 and position + 1 < len(self.token_ids)
        return self.token_ids[position + 1] if is_draft else None

    def drafts_until(self, position: int) -> list[int]:
        """Ids of the drafts up to `position`: what stands there only as long as they do."""
        first = len(self.token_ids) - self.num_drafts
        return self.token_ids[first : position + 1]

    def share(self, num_positions: int) -> None:
        """The first so many positions are in every segment's keys/values already."""
        self.filled = [num_positions] * len(self.filled)

    def restart(self) -> None:
        """Forget everything but the prompt; what follows comes out the same."""
        del self.token_ids[self.num_prompt :]
        self.exits.clear()
        self.kept = KeptTokens()
        self.finish_reason = None  # of an end that was still a draft
        self.share(0)

    def mark_filled(self, depth: int) -> None:
        """Segment `depth` has now seen every position up to the front."""
        self.filled[depth] = self.front + 1

    def leave(self, depth: int, exits: SequenceOf[TokenExit]) -> Settled:
        """The front token has gone through segment `depth` and leaves there.

        After the last segment the drafts are judged: as long as they are what the last layer says,
        they stand; the first that is not is replaced, and everything after it is rolled back.

        Args:
            depth: 0-based exit.
            exits: what follows each scored position (see `Waiting.scored`) according to this exit.

        Returns:
            What stands from now on; a draft stands only when it has been judged.
        """
        drafts = self.exits[len(self.exits) - self.num_drafts :]
        self.mark_filled(depth)
        if self._verifies and depth < len(self.filled) - 1:
            self._append(exits[-1])
            return Settled([], [], None)
        num_accepted = 0
        for draft, judged in zip(drafts, exits, strict=False):
            if draft.token_id != judged.token_id:
                break
            num_accepted += 1
        accepted = drafts[:num_accepted]
        if num_accepted == len(exits):  # They end the generation, so that nothing follows them.
            return Settled(accepted, accepted, None)
        rejected = drafts[num_accepted] if num_accepted < len(drafts) else None
        self._take_back(len(drafts) - num_accepted)
        self._append(exits[num_accepted])
        return Settled([*accepted, exits[num_accepted]], accepted, rejected)

    def _append(self, exit: TokenExit) -> None:
        """Append a generated token; it becomes the front."""
        self.exits.append(exit)
        self.token_ids.append(exit.token_id)

    def _take_back(self, count: int) -> None:
        """Forget the last `count` tokens, and that any segment has seen them."""
        if not count:
            return
        self.finish_reason = None
        del self.exits[-count:], self.token_ids[-count:]
        self.filled = [min(seen, len(self.token_ids)) for seen in self.filled]


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """What deciding needs to know about the scored tokens, beside their states; S of each.

    Attributes:
        seats: rows of the per-seat buffers.
        seeds: of their generations.
        steps: numbers of the generated tokens that they would leave as.
        may_leave: False for a token that stays before the last layer, however sure it is.
        context_drafts: ids before each token, itself included, that are drafts.
        drafts: the draft that each has already left as, to be judged; None where there is none.
    """

    seats: SequenceOf[int]
    seeds: SequenceOf[int]
    steps: SequenceOf[int]
    may_leave: SequenceOf[bool]
    context_drafts: SequenceOf[SequenceOf[int]]
    drafts: SequenceOf[int | None]

    @classmethod
    def of(cls, sequences: SequenceOf[Sequence], scored: SequenceOf[range]) -> ScoredTokens:
        """The tokens at the scored positions of each sequence, in order."""
        pairs = [
            (s, at) for s, positions in zip(sequences, scored, strict=True) for at in positions
        ]
        return cls(
            seats=[s.seat for s, _ in pairs],
            seeds=[s.seed for s, _ in pairs],
            steps=[s.step_of(at) for s, at in pairs],
            may_leave=[s.may_leave for s, _ in pairs],
            context_drafts=[s.drafts_until(at) for s, at in pairs],
            drafts=[s.draft_after(at) for s, at in pairs],
        )

    def part(self, rows: slice) -> ScoredTokens:
        """Some of the tokens."""
        return ScoredTokens(
            seats=self.seats[rows],
            seeds=self.seeds[rows],
            steps=self.steps[rows],
            may_leave=self.may_leave[rows],
            context_drafts=self.context_drafts[rows],
            drafts=self.drafts[rows],
        )
