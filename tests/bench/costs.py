"""Multiply-adds that generated rows need, given which of their tokens leave at the exit.

An account, not a measurement: every row is replayed with one exit, so that only what somebody
needed is charged. Attention's reading of keys and values is in no account. Prompt tokens that a row
shares with others, and finds computed, are not counted among its prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from eevp_batch.engine.proposals import DEFAULT_RANK


@dataclass(frozen=True)
class Work:
    """Multiply-adds by part; parts of several rows add up.

    Attributes:
        layers: decoder layers, of prompt and generated tokens.
        first_head: finding the kept ids at the exit, for every token that came there.
        last_head: the head after the last layer, for those that it scores.
        projections: keys and values of skipped layers.
    """

    layers: float = 0.0
    first_head: float = 0.0
    last_head: float = 0.0
    projections: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.layers + other.layers,
            self.first_head + other.first_head,
            self.last_head + other.last_head,
            self.projections + other.projections,
        )

    @property
    def total(self) -> float:
        return self.layers + self.first_head + self.last_head + self.projections


@dataclass(frozen=True)
class Exit:
    """One exit layer before the last, and what is paid there.

    Attributes:
        layer: the exit layer.
        kv: `propagate`, `recompute` or `verify`.
        final_head: ids that the last layer scores, `full` or `pruned`.
        proposal: what finds the kept ids; an 8-bit multiply-add counts as half a one.
        top_k: K.
        max_waiting: under `verify`, drafts that may wait. Under `recompute` the layers that tokens
            left after show the cap already.
    """

    layer: int
    kv: str
    final_head: str = "full"
    proposal: str = "full"
    top_k: int = 256
    max_waiting: int = 8


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one token in one layer, in the head, and of one layer's keys and values."""

    num_layers: int
    layer: float
    head: float
    projection: float
    width: int
    vocab_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Costs:
        """The costs of a model of the Llama family."""
        width, head_size = config.hidden_size, getattr(config, "head_dim", None)
        head_size = head_size or width // config.num_attention_heads
        q, kv = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
        return cls(
            num_layers=config.num_hidden_layers,
            layer=width * (2 * q + 2 * kv + 3 * config.intermediate_size),
            head=width * config.vocab_size,
            projection=2 * width * kv,
            width=width,
            vocab_size=config.vocab_size,
        )

    def full_depth(self, num_prompt: float, num_generated: int) -> Work:
        """A row without exits; its last token is never fed."""
        fed = num_prompt + num_generated - 1
        return Work(layers=fed * self.num_layers * self.layer, last_head=num_generated * self.head)

    def with_exit(self, num_prompt: float, exit_layers: Sequence[int], exit: Exit) -> Work:
        """A row of which some tokens left at the exit, under `propagate` or `recompute`.

        Layers behind the exit see nothing of a row until a token goes on; what waited then comes
        along, and what still waits at the end is never paid.

        Args:
            num_prompt: prompt tokens.
            exit_layers: of each generated token.
            exit: where they may leave.
        """
        below = (num_prompt + len(exit_layers) - 1) * exit.layer * self.layer
        prompt_waits, waiting = num_prompt - 1, 0
        through = projected = went_on = 0
        for number, left_after in enumerate(exit_layers):
            if left_after > exit.layer:
                reruns = waiting if exit.kv == "recompute" else 0
                through += prompt_waits + reruns + 1
                projected += waiting - reruns
                prompt_waits = waiting = 0
                went_on += 1
            elif number == 0:
                prompt_waits += 1  # it is fed the prompt's last token, which no policy projects
            else:
                waiting += 1
        behind = self.num_layers - exit.layer
        return Work(
            layers=below + through * behind * self.layer,
            first_head=len(exit_layers) * self._proposal(exit),
            last_head=went_on * (self.head if exit.final_head == "full" else self._kept(exit)),
            projections=projected * behind * self.projection,
        )

    def with_drafts(
        self, num_prompt: float, leaves: Sequence[bool], stands: Sequence[bool], exit: Exit
    ) -> Work:
        """A row under `verify`: what left at the exit is a draft until the last layer scores it.

        A token that goes on, or the end of the row, takes all drafts to the last layer. From the
        first draft that falls on, what was generated is lost and begins anew at the exit.

        Args:
            num_prompt: prompt tokens.
            leaves: whether each generated token leaves at the exit, unless the cap holds it.
            stands: whether each would stand as a draft.
            exit: where they may leave.
        """
        prompt_waits, through = num_prompt - 1, 0.0
        at_exit = scored = standing = drafts = 0
        while standing < len(leaves):
            is_end = standing + drafts == len(leaves)
            if not is_end:
                at_exit += 1
                if leaves[standing + drafts] and drafts < exit.max_waiting:
                    drafts += 1
                    continue
            judged = drafts if is_end else drafts + 1
            through += prompt_waits + judged
            scored += judged
            prompt_waits = 0
            fallen = [n for n in range(drafts) if not stands[standing + n]]
            standing += fallen[0] + 1 if fallen else judged  # another takes the fallen one's place
            drafts = 0
        behind = self.num_layers - exit.layer
        return Work(
            layers=((num_prompt - 1 + at_exit) * exit.layer + through * behind) * self.layer,
            first_head=at_exit * self._proposal(exit),
            last_head=scored * self.head,
        )

    def _kept(self, exit: Exit) -> float:
        return exit.top_k * self.width

    def _proposal(self, exit: Exit) -> float:
        if exit.proposal == "full":
            return self.head
        if exit.proposal == "int8":
            return self.head / 2 + self._kept(exit)
        rank = min(DEFAULT_RANK, self.width)
        return rank * (self.vocab_size + self.width) + self._kept(exit)
