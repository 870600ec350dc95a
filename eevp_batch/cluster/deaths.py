"""How many deaths of replicas in a row a job bears."""

from __future__ import annotations

import time
from collections.abc import Sequence

from eevp_batch.cluster import rules
from eevp_batch.cluster.bisection import patience
from eevp_batch.cluster.fleet import Slot
from eevp_batch.errors import JobFailedError
from eevp_batch.spec import RunSpec

MAX_DEATHS_IN_A_ROW = 5


class DeathWatch:
    """Counts deaths since anything was finished, those of replicas that tried suspects apart.

    Args:
        slots: of the fleet.
        run: the job's `run` section.
    """

    def __init__(self, slots: Sequence[Slot], run: RunSpec) -> None:
        self._slots = slots
        self._patience = patience(run.chunk_rows, run.max_attempts)
        self._of_suspects = 0
        self._in_a_row: set[int] = set()

    def finished(self) -> None:
        """Some replica has finished something that stays."""
        self._of_suspects = 0
        for index in self._in_a_row:
            self._slots[index].deaths_in_a_row = 0
        self._in_a_row.clear()

    def died(self, slot: Slot, reason: str, *, tried_suspect: bool) -> None:
        """Count a death, and set when the slot's next replica may start.

        Raises:
            JobFailedError: the next one would die as well.
        """
        if tried_suspect:
            self._of_suspects += 1
        else:
            slot.deaths_in_a_row += 1
            self._in_a_row.add(slot.index)
        slot.not_before_s = time.monotonic() + rules.start_delay_s(slot.deaths_in_a_row)
        if slot.deaths_in_a_row >= MAX_DEATHS_IN_A_ROW or self._of_suspects > self._patience:
            raise JobFailedError(
                f"{max(slot.deaths_in_a_row, self._of_suspects)} replicas in a row died without a "
                f"commit; the last one: {reason}"
            )
