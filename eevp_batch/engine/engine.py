"""The engine: admit, step, generate.

The queues decide, the model computes, the engine introduces them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from eevp_batch.engine.cuda_graphs import SegmentRunner, recorder_for
from eevp_batch.engine.depth_queues import DepthQueues
from eevp_batch.engine.exits import Decision, ExitRule
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.limits import Limits
from eevp_batch.engine.outcomes import failed, finished, timed_out
from eevp_batch.engine.packing import PackedTokens, pack
from eevp_batch.engine.prefixes import Prefixes
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.residents import Residents
from eevp_batch.engine.sampling import generation_seed
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ScoredTokens, Sequence, ShortPrompt
from eevp_batch.engine.shortage import is_out_of_memory
from eevp_batch.engine.stats import EngineStats
from eevp_batch.engine.stops import StopStrings
from eevp_batch.errors import (
    EngineStalledError,
    NonFiniteScoresError,
    RowError,
    UsageError,
)
from eevp_batch.records import Generation, Prompt, RowFailure, TokenExit
from eevp_batch.row_counts import KeptTokens
from eevp_batch.spec import ExitSpec, SamplingSpec
from eevp_batch.vitals import EngineVitals

PROJECTED_PER_RUN = 8
"""Tokens that are only projected for the cost of one that runs; each takes 3 to 17 % of a layer."""


class Detokenizer(Protocol):
    """The one thing the engine asks of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the ids."""


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
        short_prompt: how much of a prompt runs no further than the first exit; None: nothing.

    Attributes:
        encode: token ids of a string prompt; None where prompts come as token ids only.
        queues: who waits where.
        stats: counters.
        runner: runs packs through segments.
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
        short_prompt: ShortPrompt | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._exits, self._sampling, self._end_ids = exits, sampling, end_ids
        self._limits, self._short_prompt = limits, short_prompt
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
        self.queues: DepthQueues[Sequence] = DepthQueues(
            model.num_segments,
            limits.max_batch,
            limits.full_batch,
            limits.max_tokens,
            limits.age_cap,
        )
        self.encode: Callable[[str], list[int]] | None = None
        self.stats = EngineStats()
        self._residents = Residents(
            model,
            self.queues,
            self.stats,
            limits,
            sampling.max_new_tokens,
            self._rule.watch,
            short_prompt,
        )
        self.runner = SegmentRunner(model, self.pool, recorder_for(model))

    @property
    def model(self) -> SegmentedModel:
        """The model, cut at this engine's exit layers."""
        return self._model

    @property
    def pool(self) -> KvPool:
        """Keys and values."""
        return self._residents.pool

    @property
    def prefixes(self) -> Prefixes:
        """Shared beginnings; `generate` gives them up at its end, `step` keeps them."""
        return self._residents.prefixes

    @property
    def max_resident(self) -> int:
        """Most sequences that can be resident; fewer once memory has run out."""
        return self._residents.max_resident

    @property
    def is_idle(self) -> bool:
        """True when nothing is waiting, resident or on its way."""
        return not self._residents.arrivals and not len(self.queues)

    @property
    def has_room(self) -> bool:
        """Whether another prompt could become resident now; adding beyond it only queues."""
        return len(self._residents.arrivals) < self._residents.num_free_seats

    @property
    def vitals(self) -> EngineVitals:
        """What it holds and has done, at this moment."""
        return EngineVitals(
            num_layers=self._model.num_layers,
            num_kept_ids=self._rule.num_kept,
            steps=self.stats.steps.copy(),
            rows=self.stats.rows.copy(),
            kept=self.stats.kept,
            waiting=self.queues.lengths,
            arrivals=len(self._residents.arrivals),
            pages=self.pool.num_pages,
            pages_in_use=self.pool.num_pages_in_use,
        )

    def add(self, prompt: Prompt) -> None:
        """Queue one prompt; it becomes resident when memory allows."""
        seed = generation_seed(self._sampling.seed, prompt.row_id, prompt.sample_index)
        self._residents.arrivals.append(
            Sequence(
                prompt,
                self._model.num_segments,
                self._sampling.max_new_tokens,
                seed,
                self._exits.kv,
                self._exits.max_waiting,
                self._short_prompt,
            )
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
        self.prefixes.clear()

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

        Where memory runs out the batch halves and its sequences start again; one that does not fit
        alone fails.

        Raises:
            EngineStalledError: nothing could run although work remains.
        """
        refused = [failed(*found) for found in self._residents.admit()]
        batch = self.queues.pop(_cost)
        if batch is None:
            if not refused and not self.is_idle:
                raise EngineStalledError(
                    f"{len(self._residents.arrivals)} sequences wait and none could be admitted"
                )
            return [*refused]
        depth, sequences = batch
        if depth == 0:
            self._residents.entered()
        sequences = self._residents.grow(sequences)
        if not sequences:  # all of them start again
            return [*refused]
        found = self._run(depth, sequences)
        if found is None:
            cost = sum(_cost(depth, sequence) for sequence in sequences)
            too_large = self._residents.make_do(sequences, cost)
            return [*refused, *(failed(*found) for found in too_large)]
        tokens, decision = found
        self.stats.steps[depth] += 1
        self.stats.rows[depth] += len(sequences)
        self.stats.packed_tokens += tokens.num_tokens
        return [*refused, *self._record(depth, sequences, tokens.scored, decision)]

    def _run(self, depth: int, sequences: list[Sequence]) -> tuple[PackedTokens, Decision] | None:
        """What the model and the exits say of a batch; None where memory ran out.

        With the exception go the activations that its traceback keeps alive.
        """
        try:
            tokens = pack(sequences, depth, self.pool, self._model.layers.row_multiple)
            states = self.runner.run(depth, tokens)
            scored = ScoredTokens.of(sequences, tokens.scored)
            return tokens, self._rule.decide(depth, states, scored)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _record(
        self, depth: int, sequences: list[Sequence], scored: list[range], decision: Decision
    ) -> list[Generation | RowFailure]:
        """Stayers go one deeper, leavers emit and start again at depth 0 or finish."""
        results: list[Generation | RowFailure] = []
        exit_layer = self._model.exit_layers[depth]
        stop, now_s = 0, time.monotonic()
        for sequence, positions in zip(sequences, scored, strict=True):
            start, stop = stop, stop + len(positions)
            if not all(decision.is_finite[start:stop]):
                error = NonFiniteScoresError(
                    f"scores after layer {exit_layer} are not finite at generated token "
                    f"{sequence.num_generated}"
                )
                results.append(failed(sequence, error))
                self._residents.taint(sequence)
                self._residents.leave(sequence)
            elif now_s > sequence.deadline_s:
                results.append(failed(sequence, timed_out(sequence)))
                self._residents.leave(sequence)
            elif not decision.leaves[stop - 1]:
                sequence.mark_filled(depth)
                self.queues.push(depth + 1, sequence)
            else:
                exits = [
                    TokenExit(decision.token_ids[row], exit_layer, decision.confidences[row])
                    for row in range(start, stop)
                ]
                results += self._settle(depth, sequence, exits, decision.is_kept[stop - 1])
        return results

    def _settle(
        self, depth: int, sequence: Sequence, exits: list[TokenExit], is_kept: bool | None
    ) -> list[Generation]:
        """Let the front token leave; the generation goes on, has its end judged, or is finished."""
        settled = sequence.leave(depth, exits)
        self.stats.count(settled)
        if is_kept is not None and settled.rejected is None:
            found = KeptTokens(1, int(is_kept))
            sequence.kept += found
            self.stats.kept += found
        self._rule.watch(sequence.seat, [exit.token_id for exit in settled.exits])
        if sequence.finish_reason is None:
            sequence.finish_reason = self._finish_reason(sequence)
        if sequence.finish_reason is None:
            self.queues.push(0, sequence)
        elif sequence.num_drafts:
            self.queues.push(depth + 1, sequence)
        else:
            return [self._finish(sequence)]
        return []

    def _finish_reason(self, sequence: Sequence) -> str | None:
        if sequence.token_ids[-1] in self._end_ids:
            return "eos"
        if self._stops.is_reached(sequence.token_ids, sequence.num_prompt):
            return "stop"
        return "length" if sequence.num_generated >= sequence.max_new_tokens else None

    def _finish(self, sequence: Sequence) -> Generation:
        text = self._decode(sequence.token_ids[sequence.num_prompt :])
        if sequence.finish_reason == "stop":
            text = self._stops.cut(text)
        self._residents.leave(sequence)
        self.stats.finished += 1
        return finished(sequence, text, self._model.num_layers)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def _cost(depth: int, sequence: Sequence) -> int:
    """About as many packed tokens as what a sequence brings into segment `depth` costs."""
    waiting = sequence.waiting(depth)
    return len(waiting.run) + waiting.num_projected // PROJECTED_PER_RUN
