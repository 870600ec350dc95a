"""One generation in progress: its tokens, how far its keys/values reach, and where it stands.

Knows positions and counts; touches no tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from eevp_batch.records import Prompt, TokenExit


class Waiting(NamedTuple):
    """Positions of one sequence that a segment has not seen yet, the front token included.

    Attributes:
        run: positions that go through the segment's layers; the last one is the front token.
        project: positions whose keys/values are projected from the state they left with.
    """

    run: list[int]
    project: range


class Sequence:
    """One prompt and what has been generated from it.

    The *front* token is the last one; it is the token on its way through the segments. Positions
    before it may still be missing from the keys/values of deeper segments: `filled[d]` is the
    number of leading positions that segment d has seen.

    Args:
        prompt: what to continue.
        num_segments: D, segments of the model.
        max_new_tokens: generation ends at the latest after so many tokens.
        seed: 64-bit seed of this generation.
    """

    def __init__(self, prompt: Prompt, num_segments: int, max_new_tokens: int, seed: int) -> None:
        self.prompt = prompt
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.token_ids = list(prompt.token_ids)
        self.exits: list[TokenExit] = []
        self.filled = [0] * num_segments
        self.pages: list[int] = []
        self.promised = 0  # pages that it counts on and does not have yet
        self.seat = -1
        self.finish_reason: str | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.exits)

    @property
    def front(self) -> int:
        """Position of the front token."""
        return len(self.token_ids) - 1

    @property
    def max_positions(self) -> int:
        """Most positions whose keys/values are ever held: the last token is never fed back."""
        return self.num_prompt + self.max_new_tokens - 1

    def waiting(self, depth: int) -> Waiting:
        """What must enter segment `depth` now, under the KV policy `propagate`.

        Prompt tokens always run, so that a prompt is held at full depth; a generated token that
        left before this segment is only projected (CALM, section 3.4). Other policies differ in
        this split and nowhere else: `recompute` and `verify` run every waiting position.
        """
        first = self.filled[depth]
        first_generated = min(max(first, self.num_prompt), self.front)
        return Waiting(
            run=[*range(first, first_generated), self.front],
            project=range(first_generated, self.front),
        )

    def share(self, num_positions: int) -> None:
        """The first so many positions are in every segment's keys/values already."""
        self.filled = [num_positions] * len(self.filled)

    def restart(self) -> None:
        """Forget everything but the prompt; what follows comes out the same."""
        del self.token_ids[self.num_prompt :]
        self.exits.clear()
        self.share(0)

    def mark_filled(self, depth: int) -> None:
        """Segment `depth` has now seen every position up to the front."""
        self.filled[depth] = self.front + 1

    def emit(self, exit: TokenExit) -> None:
        """Append a generated token; it becomes the front."""
        self.exits.append(exit)
        self.token_ids.append(exit.token_id)
