"""The engine: admit, step, generate.

The queues decide, the model computes, the engine introduces them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from eevp_batch.engine.depth_queues import DepthQueues
from eevp_batch.engine.exits import Decision, ExitRule, Fronts
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.limits import Limits
from eevp_batch.engine.packing import pack
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.sampling import generation_seed, uniform
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Sequence
from eevp_batch.engine.stops import StopStrings
from eevp_batch.errors import (
    EngineStalledError,
    NonFiniteScoresError,
    PromptTooLongError,
    RowError,
    UsageError,
)
from eevp_batch.records import Generation, Prompt, RowFailure, TokenExit
from eevp_batch.spec import ExitSpec, SamplingSpec


class Detokenizer(Protocol):
    """The one thing the engine asks of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the ids."""


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was built.

    Attributes:
        steps, rows: segment runs and the sequences in them, by depth.
        packed_tokens: tokens that went through a segment, prompts included.
        exit_histogram: emitted tokens by exit layer.
    """

    steps: Counter[int] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    packed_tokens: int = 0
    finished: int = 0
    exit_histogram: Counter[int] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return self.exit_histogram.total()


class Engine:
    """Generates for many prompts at once; a row's output depends on the row alone.

    Args:
        model: a decoder cut at its exit layers.
        tokenizer: for the text of a generation and for stop strings.
        exits: confidence, thresholds, pruning.
        sampling: how tokens are chosen and when a generation ends.
        prune_layer: the exit layer that cuts the vocabulary; None turns pruning off.
        end_ids: ids that end a generation.
        limits: what fits.
        proposal: proposes the ids to keep; None: the head itself.

    Attributes:
        encode: token ids of a string prompt; None where prompts come as token ids only.
        pool, queues: keys and values, and who waits where.
        stats: counters.
    """

    def __init__(
        self,
        model: SegmentedModel,
        tokenizer: Detokenizer,
        exits: ExitSpec,
        sampling: SamplingSpec,
        prune_layer: int | None,
        end_ids: frozenset[int],
        limits: Limits,
        proposal: Proposal | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sampling, self._end_ids, self._limits = sampling, end_ids, limits
        self._stops = StopStrings(sampling.stop, self._decode)
        self._rule = ExitRule(
            head=model,
            exit_layers=model.exit_layers,
            prune_layer=prune_layer,
            exits=exits,
            sampling=sampling,
            always_kept=sorted(end_ids),
            max_resident=limits.max_resident,
            max_batch=limits.max_batch,
            proposal=proposal,
        )
        self.pool = KvPool(
            num_pages=limits.num_pages,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            hidden_size=model.hidden_size,
            max_resident=limits.max_resident,
            max_pages=limits.max_pages,
            dtype=model.dtype,
            device=model.device,
        )
        self.queues: DepthQueues[Sequence] = DepthQueues(
            model.num_segments, limits.max_batch, limits.max_tokens, limits.age_cap
        )
        self._arrivals: deque[Sequence] = deque()
        self.encode: Callable[[str], list[int]] | None = None
        self.stats = EngineStats()

    @property
    def max_resident(self) -> int:
        """Most sequences that can ever be resident."""
        return self._limits.max_resident

    @property
    def is_idle(self) -> bool:
        """True when nothing is waiting, resident or on its way."""
        return not self._arrivals and not len(self.queues)

    @property
    def has_room(self) -> bool:
        """Whether another prompt could become resident now; adding beyond it only queues."""
        return len(self._arrivals) < self.pool.num_free_seats

    def add(self, prompt: Prompt) -> None:
        """Queue one prompt; it becomes resident when memory allows."""
        seed = generation_seed(self._sampling.seed, prompt.row_id, prompt.sample_index)
        self._arrivals.append(
            Sequence(prompt, self._model.num_segments, self._sampling.max_new_tokens, seed)
        )

    def generate(self, prompts: Iterable[Prompt | str]) -> Iterator[Generation | RowFailure]:
        """Generate for every prompt, yielding each result as soon as it is finished.

        Prompts are pulled only as memory allows, so the iterable may be endless.

        Args:
            prompts: a string takes its number, from 0 on, as row id, and needs `encode`.

        Raises:
            EngineStalledError: a bug in the engine; nothing else is raised for a row.
        """
        source = enumerate(prompts)
        is_open = True
        while is_open or not self.is_idle:
            while is_open and self.has_room:
                row = next(source, None)
                if row is None:
                    is_open = False
                    break
                try:
                    self.add(self._prompt(*row))
                except RowError as error:
                    yield RowFailure(row[0], type(error).__name__, str(error))
            if not self.is_idle:
                yield from self.step()

    def _prompt(self, number: int, prompt: Prompt | str) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if self.encode is None:
            raise UsageError(
                "prompts: found a string; allowed: token ids, the engine has no encode"
            )
        return Prompt(row_id=number, token_ids=self.encode(prompt))

    @torch.inference_mode()
    def step(self) -> list[Generation | RowFailure]:
        """Run one batch through one segment; returns what it finished.

        Raises:
            EngineStalledError: nothing could run although work remains.
        """
        refused = self._admit()
        batch = self.queues.pop(_cost)
        if batch is None:
            if not refused and not self.is_idle:
                raise EngineStalledError(
                    f"{len(self._arrivals)} sequences wait and none could be admitted"
                )
            return list(refused)
        depth, sequences = batch
        for sequence in sequences:
            self.pool.grow(sequence)
        tokens = pack(sequences, depth, self.pool)
        states = self._model.run_segment(depth, tokens, self.pool)
        decision = self._rule.decide(depth, states, self._fronts(sequences))
        self.stats.steps[depth] += 1
        self.stats.rows[depth] += len(sequences)
        self.stats.packed_tokens += tokens.num_tokens
        return [*refused, *self._record(depth, sequences, decision)]

    def _admit(self) -> list[RowFailure]:
        """Make arrivals resident while they fit; those that never will are refused."""
        refused: list[RowFailure] = []
        while self._arrivals:
            sequence = self._arrivals[0]
            if not self.pool.can_ever_hold(sequence):
                error = PromptTooLongError(
                    f"{sequence.num_prompt} prompt tokens and {sequence.max_new_tokens} new ones "
                    f"do not fit the {self.pool.max_positions} that keys and values have room for"
                )
                refused.append(_failure(self._arrivals.popleft(), error))
            elif self.pool.can_admit(sequence):
                self._arrivals.popleft()
                self.pool.admit(sequence)
                self._rule.watch(sequence.seat, sequence.token_ids, start=True)
                self.queues.push(0, sequence)
            else:
                break
        return refused

    def _fronts(self, sequences: list[Sequence]) -> Fronts:
        is_greedy = self._sampling.temperature == 0
        return Fronts(
            seats=torch.tensor([s.seat for s in sequences], device=self._model.device),
            steps=[s.num_generated for s in sequences],
            uniforms=[0.0 if is_greedy else uniform(s.seed, s.num_generated) for s in sequences],
        )

    def _record(
        self, depth: int, sequences: list[Sequence], decision: Decision
    ) -> list[Generation | RowFailure]:
        """Stayers go one deeper, leavers emit and start again at depth 0 or finish."""
        results: list[Generation | RowFailure] = []
        for row, sequence in enumerate(sequences):
            sequence.mark_filled(depth)
            if not decision.is_finite[row]:
                error = NonFiniteScoresError(
                    f"scores after layer {self._model.exit_layers[depth]} are not finite at "
                    f"generated token {sequence.num_generated}"
                )
                results.append(_failure(sequence, error))
                self.pool.release(sequence, scrub=True)
            elif not decision.leaves[row]:
                self.queues.push(depth + 1, sequence)
            else:
                exit_layer = self._model.exit_layers[depth]
                sequence.emit(
                    TokenExit(decision.token_ids[row], exit_layer, decision.confidences[row])
                )
                self.stats.exit_histogram[exit_layer] += 1
                self._rule.watch(sequence.seat, sequence.token_ids[-1:])
                sequence.finish_reason = self._finish_reason(sequence)
                if sequence.finish_reason is None:
                    self.queues.push(0, sequence)
                else:
                    results.append(self._finish(sequence))
        return results

    def _finish_reason(self, sequence: Sequence) -> str | None:
        if sequence.token_ids[-1] in self._end_ids:
            return "eos"
        if self._stops.is_reached(sequence.token_ids[sequence.num_prompt :]):
            return "stop"
        return "length" if sequence.num_generated >= sequence.max_new_tokens else None

    def _finish(self, sequence: Sequence) -> Generation:
        text = self._decode(sequence.token_ids[sequence.num_prompt :])
        if sequence.finish_reason == "stop":
            text = self._stops.cut(text)
        generation = Generation(
            row_id=sequence.prompt.row_id,
            sample_index=sequence.prompt.sample_index,
            prompt_tokens=sequence.num_prompt,
            exits=sequence.exits,
            text=text,
            finish_reason=str(sequence.finish_reason),
            seed=sequence.seed,
            num_layers=self._model.num_layers,
            tag=sequence.prompt.tag,
        )
        self.pool.release(sequence)
        self.stats.finished += 1
        return generation

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def _cost(depth: int, sequence: Sequence) -> int:
    """Packed tokens that a sequence brings into segment `depth`."""
    return len(sequence.waiting(depth).run)


def _failure(sequence: Sequence, error: RowError) -> RowFailure:
    return RowFailure(
        row_id=sequence.prompt.row_id,
        error_class=type(error).__name__,
        message=str(error),
        tag=sequence.prompt.tag,
    )
