"""What becomes of the sequences of a batch: they go deeper, start over at depth 0, or are finished.

Knows sequences, queues and texts; touches no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from eevp_batch.engine.depth_queues import DepthQueues
from eevp_batch.engine.exits import Decision
from eevp_batch.engine.outcomes import failed, finished, timed_out
from eevp_batch.engine.residents import Residents
from eevp_batch.engine.sequence import Sequence
from eevp_batch.engine.stats import EngineStats
from eevp_batch.engine.stops import StopStrings
from eevp_batch.errors import NonFiniteScoresError, RowError
from eevp_batch.records import Generation, RowFailure, TokenExit
from eevp_batch.row_counts import KeptTokens


class Detokenizer(Protocol):
    """The one thing the engine asks of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the ids."""


class Results:
    """Records decisions, and holds what is finished until somebody drains it.

    Args:
        exit_layers: e_1 < ... < e_D.
        tokenizer: for texts and stop strings.
        stop: strings that end a generation.
        end_ids: ids that end a generation.
        queues: who waits where.
        residents: who is in memory.
        stats: what is counted.
        watch: told of the ids that a seat's sequence got.
    """

    def __init__(
        self,
        exit_layers: tuple[int, ...],
        tokenizer: Detokenizer,
        stop: list[str],
        end_ids: frozenset[int],
        queues: DepthQueues[Sequence],
        residents: Residents,
        stats: EngineStats,
        watch: Callable[[int, list[int]], None],
    ) -> None:
        self._exit_layers, self._tokenizer = exit_layers, tokenizer
        self.end_ids = end_ids
        self._stops = StopStrings(stop, self._decode)
        self.queues, self._residents = queues, residents
        self._stats, self._watch = stats, watch
        self._found: list[Generation | RowFailure] = []

    def __len__(self) -> int:
        return len(self._found)

    def drain(self) -> list[Generation | RowFailure]:
        """What was finished since the last time."""
        found, self._found = self._found, []
        return found

    def give_up(self, tag: int) -> int:
        """Drop what is finished with this tag; how many there were."""
        dropped = [result for result in self._found if result.tag == tag]
        self._found = [result for result in self._found if result.tag != tag]
        for result in dropped:
            if isinstance(result, Generation):
                self._stats.discount(result.exits)
                self._stats.finished -= 1
        return len(dropped)

    def fail(self, sequence: Sequence, error: RowError) -> None:
        """A row that cannot be done."""
        self._found.append(failed(sequence, error))

    def record(
        self, depth: int, sequences: list[Sequence], scored: list[range], decision: Decision
    ) -> None:
        """Stayers go one deeper, leavers emit and start again at depth 0 or finish."""
        exit_layer = self._exit_layers[depth]
        stop, now_s = 0, time.monotonic()
        for sequence, positions in zip(sequences, scored, strict=True):
            start, stop = stop, stop + len(positions)
            if not all(decision.is_finite[start:stop]):
                error = NonFiniteScoresError(
                    f"scores after layer {exit_layer} are not finite at generated token "
                    f"{sequence.num_generated}"
                )
                self.fail(sequence, error)
                self._residents.taint(sequence)
                self._residents.leave(sequence)
            elif now_s > sequence.deadline_s:
                self.fail(sequence, timed_out(sequence))
                self._residents.leave(sequence)
            elif not decision.leaves[stop - 1]:
                sequence.mark_filled(depth)
                self.queues.push(depth + 1, sequence)
            else:
                exits = [
                    TokenExit(decision.token_ids[row], exit_layer, decision.confidences[row])
                    for row in range(start, stop)
                ]
                self._settle(depth, sequence, exits, decision.is_kept[stop - 1])

    def _settle(
        self, depth: int, sequence: Sequence, exits: list[TokenExit], is_kept: bool | None
    ) -> None:
        """Let the front token leave; the generation goes on, has its end judged, or is finished."""
        settled = sequence.leave(depth, exits)
        self._stats.count(settled)
        if is_kept is not None and settled.rejected is None:
            found = KeptTokens(1, int(is_kept))
            sequence.kept += found
            self._stats.kept += found
        self._watch(sequence.seat, [exit.token_id for exit in settled.exits])
        if sequence.finish_reason is None:
            sequence.finish_reason = self._finish_reason(sequence)
        if sequence.finish_reason is None:
            self.queues.push(0, sequence)
        elif sequence.num_drafts:
            self.queues.push(depth + 1, sequence)
        else:
            self._finish(sequence)

    def _finish_reason(self, sequence: Sequence) -> str | None:
        if sequence.token_ids[-1] in self.end_ids:
            return "eos"
        if self._stops.is_reached(sequence.token_ids, sequence.num_prompt):
            return "stop"
        return "length" if sequence.num_generated >= sequence.max_new_tokens else None

    def _finish(self, sequence: Sequence) -> None:
        text = self._decode(sequence.token_ids[sequence.num_prompt :])
        if sequence.finish_reason == "stop":
            text = self._stops.cut(text)
        self._residents.leave(sequence)
        self._stats.finished += 1
        self._found.append(finished(sequence, text, self._exit_layers[-1]))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
