"""The engine: admit, step, generate.

The queues decide, the model computes, the engine introduces them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch

from eevp_batch.engine.crew import Crew
from eevp_batch.engine.depth_queues import Batch, DepthQueues
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.limits import Limits
from eevp_batch.engine.prefixes import Prefixes
from eevp_batch.engine.proposals import Proposal
from eevp_batch.engine.residents import Residents
from eevp_batch.engine.results import Detokenizer, Results
from eevp_batch.engine.sampling import generation_seed
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Sequence, ShortPrompt
from eevp_batch.engine.stage import Ran, Stage, make_rules, make_stages
from eevp_batch.engine.stats import EngineStats
from eevp_batch.errors import EngineStalledError, RowError, UsageError
from eevp_batch.records import Generation, Prompt, RowFailure
from eevp_batch.spec import ExitSpec, SamplingSpec
from eevp_batch.vitals import EngineVitals

PROJECTED_PER_RUN = 8
"""Tokens that are only projected for the cost of one that runs; each takes 3 to 17 % of a layer."""


class Engine:
    """Generates for many prompts at once; a row's output depends on the row alone.

    Args:
        model: a decoder cut at its exit layers; where it has several parts, or one that keeps to
            some cores, each gets a thread that runs its segments.
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
        stages: what runs on each device.
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
        self._model, self._exits, self._sampling = model, exits, sampling
        self._limits, self._short_prompt = limits, short_prompt
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
            self._watch,
            short_prompt,
        )
        rules = make_rules(model, exits, sampling, prune_layer, sorted(end_ids), limits, proposal)
        self.stages = make_stages(model, rules, self.pool)
        self._results = Results(
            model.exit_layers,
            tokenizer,
            sampling.stop,
            end_ids,
            self.queues,
            self._residents,
            self.stats,
            self._watch,
        )
        has_threads = len(self.stages) > 1 or bool(model.place.cores)
        self._crew = Crew(self.stages, self) if has_threads else None

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
        return not self.has_work and not self.has_results

    @property
    def has_room(self) -> bool:
        """Whether another prompt could become resident now; adding beyond it only queues."""
        return len(self._residents.arrivals) < self._residents.num_free_seats

    @property
    def vitals(self) -> EngineVitals:
        """What it holds and has done, at this moment."""
        return EngineVitals(
            num_layers=self._model.num_layers,
            num_kept_ids=self.stages[0].rule.num_kept,
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
        sequence = Sequence(
            prompt,
            self._model.num_segments,
            self._sampling.max_new_tokens,
            generation_seed(self._sampling.seed, prompt.row_id, prompt.sample_index),
            self._exits.kv,
            self._exits.max_waiting,
            self._short_prompt,
        )
        with self._crew.lock if self._crew else nullcontext():
            self._residents.arrivals.append(sequence)
            if self._crew:
                self._crew.tell()

    def give_up(self, tag: int) -> int:
        """Drop the prompts with this tag, between steps; how many there were."""
        if self._crew:
            self._crew.stop()  # so that nothing is on its way; the next step starts it again
        return self._results.give_up(tag) + self._residents.give_up(tag)

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
        try:
            while is_open or not self.is_idle:
                while is_open and self.has_room:
                    row = next(source, None)
                    if row is None:
                        is_open = False
                        break
                    try:
                        self.add(self._prompt(*row))
                    except RowError as error:
                        yield RowFailure.of(row[0], error)
                if not self.is_idle:
                    yield from self.step()
        finally:
            if self._crew:
                self._crew.stop()
        self.prefixes.clear()

    def _prompt(self, number: int, prompt: Prompt | str) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if self.encode is None:
            raise UsageError(
                "prompts: found a string; allowed: token ids, the engine has no encode"
            )
        return Prompt(row_id=number, token_ids=self.encode(prompt))

    def step(self) -> list[Generation | RowFailure]:
        """Run one batch through one segment; returns what it finished.

        On several devices: wait until one of them has run a batch, while the others go on.

        Where memory runs out the batch halves and its sequences start again; one that does not fit
        alone fails.

        Raises:
            EngineStalledError: nothing could run although work remains.
            ModelError: the model's files were written to while they were in use.
        """
        if self._crew is not None:
            self._crew.step()
            with self._crew.lock:
                finished = self._results.drain()
        else:
            self._turn(self.stages[0])
            finished = self._results.drain()
        if finished and self.model.stored is not None:
            self.model.stored.check()
        return finished

    @torch.inference_mode()
    def _turn(self, stage: Stage) -> None:
        """What each thread of several devices does again and again."""
        batch = self.take(stage)
        if batch is None:
            if not self.has_results:
                self.check_stall()
            return
        sequences = self.grow(batch.sequences, set())
        if sequences:  # else all of them start again
            batch = Batch(batch.depth, sequences)
            self.give_back(batch, stage.run(*batch))

    # --- what the threads of several devices share, see `crew.Desk` -------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything waits or is resident."""
        return len(self._residents.arrivals) + len(self._residents) > 0

    @property
    def has_results(self) -> bool:
        """Whether anything is finished that `step` has not returned yet."""
        return len(self._results) > 0

    def take(self, stage: Stage) -> Batch[Sequence] | None:
        """Admit who fits, and take the next batch for a device; None where nobody waits there."""
        if 0 in stage.depths:
            for found in self._residents.admit():
                self._results.fail(*found)
        fair = -(-len(self._residents) // len(self.stages))  # that the others have work too
        batch = self.queues.pop(_cost, stage.depths, fair if len(self.stages) > 1 else None)
        if batch is not None and batch.depth == 0:
            self._residents.entered()
        return batch

    def grow(self, sequences: list[Sequence], running: set[Sequence]) -> list[Sequence] | None:
        """See `Residents.grow`; on one device never None."""
        return self._residents.grow(sequences, running)

    def put_back(self, batch: Batch[Sequence]) -> None:
        """A batch that was taken and does not run."""
        for sequence in batch.sequences:
            if sequence.seat >= 0:
                self.queues.push(batch.depth, sequence)

    def give_back(self, batch: Batch[Sequence], ran: Ran | None) -> None:
        """Record what a batch has come to; make do where there was no memory to run it."""
        depth, sequences = batch
        if ran is None:
            cost = sum(_cost(depth, sequence) for sequence in sequences)
            device = self._model.part(depth).device
            for found in self._residents.make_do(sequences, cost, device):
                self._results.fail(*found)
            return
        self.stats.steps[depth] += 1
        self.stats.rows[depth] += len(sequences)
        self.stats.packed_tokens += ran.num_tokens
        self._results.record(depth, sequences, ran.scored, ran.decision)

    def check_stall(self) -> None:
        """Called where nothing runs and nothing could be taken.

        Raises:
            EngineStalledError: work remains all the same.
        """
        if self.has_work and not len(self.queues):
            raise EngineStalledError(
                f"{len(self._residents.arrivals)} sequences wait and none could be admitted"
            )

    def _watch(self, seat: int, token_ids: list[int], *, start: bool = False) -> None:
        """Tell the exits of every device; see `ExitRule.watch`."""
        for stage in self.stages:
            stage.rule.watch(seat, token_ids, start=start)


def _cost(depth: int, sequence: Sequence) -> int:
    """About as many packed tokens as what a sequence brings into segment `depth` costs."""
    waiting = sequence.waiting(depth)
    return len(waiting.run) + waiting.num_projected // PROJECTED_PER_RUN
