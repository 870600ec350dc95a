"""Ends a job in which nothing moves, and says who is stuck and at what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from eevp_batch.cluster.fleet import Resources, Slot
from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.progress import Progress
from eevp_batch.errors import JobFailedError

_MOST_BETWEEN_LOOKS_S = 5.0
"""More than that between two looks is a pause: of this process, of the machine, or for storage."""
_NAMED = 8


class StallWatch:
    """Counts the seconds for which nothing moves.

    Args:
        timeout_s: `run.no_progress_timeout_s`.
        stuck: says who does not get on.
    """

    def __init__(self, timeout_s: float, stuck: Callable[[], str]) -> None:
        self._timeout_s, self._stuck = timeout_s, stuck
        self._moved: tuple[int, ...] = ()
        self._looked_s = self._still_s = 0.0

    def look(self, progress: Progress) -> None:
        """Look once.

        Raises:
            JobFailedError: nothing has moved for too long.
        """
        now_s = progress.elapsed_s
        self._still_s += min(now_s - self._looked_s, _MOST_BETWEEN_LOOKS_S)
        self._looked_s = now_s
        moved = (progress.chunks_committed, progress.tokens, progress.rows_done)
        if moved != self._moved:
            self._moved, self._still_s = moved, 0.0
        if self._still_s >= self._timeout_s:
            raise JobFailedError(
                f"nothing was committed and no token came for {self._still_s:.0f} s "
                f"(run.no_progress_timeout_s); the same command goes on from what is committed\n"
                + self._stuck()
            )


def describe(
    slots: Sequence[Slot], held: Callable[[str], Iterable[Lease]], resources: Resources
) -> str:
    """One line for each replica: what it holds and what it does.

    Args:
        slots: the job's.
        held: leases of a replica, by its name.
        resources: what each replica asks of Ray.
    """
    slots = [slot for slot in slots if not slot.is_empty or slot.deaths_in_a_row]
    lines = [_line(slot, list(held(slot.name)), resources) for slot in slots[:_NAMED]]
    if len(slots) > _NAMED:
        lines.append(f"  and {len(slots) - _NAMED} more")
    return "\n".join(lines)


def _line(slot: Slot, leases: list[Lease], resources: Resources) -> str:
    if slot.is_empty:
        does = f"died {slot.deaths_in_a_row} times in a row and waits for its next start"
    elif slot.progress.doing:
        does = slot.progress.doing
    elif slot.handle is None:
        does = f"has no place: Ray has no node with {resources} to spare"
    else:
        does = "has not come up: Ray is still starting its process"
    chunks = ", ".join(f"{lease.chunk_id:05d}" for lease in leases)
    return f"  {slot.name}{f' with chunk {chunks}' if chunks else ''}: {does}"
