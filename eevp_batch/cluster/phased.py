"""One engine at a time: prompts of another phase wait until the engine of this one is empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eevp_batch.cluster.engine_loop import RowEngine
from eevp_batch.errors import RowError
from eevp_batch.records import Generation, Phase, Prompt, RowFailure
from eevp_batch.vitals import EngineVitals, vitals_of


@dataclass(frozen=True, slots=True)
class _Sum:
    """Counters over all engines so far."""

    exit_histogram: Counter[int]
    shortages: int

    @property
    def tokens(self) -> int:
        return self.exit_histogram.total()


class PhasedEngine:
    """An engine that is replaced when the phase of its prompts changes, which is seldom.

    Args:
        make: the engine of a phase; called when the one before has been given up, since two may
            not fit into memory.
        phase: of the first engine, which is made at once.
    """

    def __init__(self, make: Callable[[Phase], RowEngine], phase: Phase) -> None:
        self._make = make
        self._engine: RowEngine | None = make(phase)
        self._phase = phase
        self._max_resident = self._engine.max_resident
        self._before = _Sum(Counter(), 0)
        self._vitals_before = EngineVitals()
        self._waiting: list[Prompt] = []

    @property
    def has_room(self) -> bool:
        return not self._waiting and (self._engine is None or self._engine.has_room)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and self._is_empty

    @property
    def max_resident(self) -> int:
        return self._max_resident

    @property
    def stats(self) -> _Sum:
        before = self._before
        if self._engine is None:
            return before
        now = self._engine.stats
        return _Sum(before.exit_histogram + now.exit_histogram, before.shortages + now.shortages)

    @property
    def vitals(self) -> EngineVitals:
        """Of the engine of the moment, with what those before it have done."""
        return vitals_of(self._engine).after(self._vitals_before)

    @property
    def _is_empty(self) -> bool:
        return self._engine is None or self._engine.is_idle

    def add(self, prompt: Prompt) -> None:
        """Make a prompt resident, or let it wait for the engine of its phase."""
        if self._engine is None or prompt.phase != self._phase or self._waiting:
            self._waiting.append(prompt)
        else:
            self._engine.add(prompt)

    def step(self) -> Sequence[Generation | RowFailure]:
        """Run one batch through one segment, after a change of engines where one is due."""
        refused = self._change() if self._waiting and self._is_empty else []
        if self._engine is None or self._engine.is_idle:
            return refused
        return [*refused, *self._engine.step()]

    def give_up(self, tag: int) -> int:
        """Drop the prompts with this tag; how many there were."""
        kept = [prompt for prompt in self._waiting if prompt.tag != tag]
        num_waiting, self._waiting = len(self._waiting) - len(kept), kept
        return num_waiting + (0 if self._engine is None else self._engine.give_up(tag))

    def release(self) -> None:
        """Give the engine up, which has to be idle; it is made again when needed."""
        self._before, self._vitals_before = self.stats, self.vitals
        self._engine = None

    def _change(self) -> list[RowFailure]:
        """Make the engine of the prompts that wait; those that it will not take."""
        self.release()
        self._phase = self._waiting[0].phase
        self._engine = self._make(self._phase)
        self._max_resident = self._engine.max_resident
        waiting, self._waiting, refused = self._waiting, [], []
        for prompt in waiting:
            try:
                self.add(prompt)
            except RowError as error:
                refused.append(RowFailure.of(prompt.row_id, error, prompt.tag))
        return refused
