"""Says when fewer replicas than a job needs have found a place, and ends it when that lasts."""

from __future__ import annotations

from collections.abc import Callable

from eevp_batch.cluster.fleet import Resources
from eevp_batch.errors import JobFailedError

FIRST_TOLD_S = 10.0
_MOST_BETWEEN_LOOKS_S = 5.0
"""More than that between two looks is a pause of this process or of the machine."""


class PlacementWatch:
    """Counts the seconds for which too few replicas have a place.

    At first a job needs its `cluster.replicas.min`; once it has had these, one is enough, for nodes
    may leave as well.

    Args:
        needed: replicas that the job needs at first.
        timeout_s: `cluster.placement_timeout_s`.
        resources: what each of them asks for.
        room: says what is free on the nodes.
        say: told while the job waits, less and less often.
    """

    def __init__(
        self,
        needed: int,
        timeout_s: float,
        resources: Resources,
        room: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        self._needed, self._timeout_s = needed, timeout_s
        self._resources, self._room, self._say = resources, room, say
        self._looked_s: float | None = None
        self._waited_s, self._tell_at_s = 0.0, FIRST_TOLD_S

    def look(self, now_s: float, placed: int, wanted: int) -> bool:
        """Look once; call it about once a second.

        Args:
            now_s: monotonic time.
            placed: replicas that have a place.
            wanted: replicas that there is work for.

        Returns:
            Whether enough have one.

        Raises:
            JobFailedError: too few had one for too long.
        """
        passed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        needed = min(self._needed, wanted)
        if placed >= needed:
            self._needed = min(1, self._needed) if placed >= self._needed else self._needed
            self._waited_s, self._tell_at_s = 0.0, FIRST_TOLD_S
            return True
        self._waited_s += min(passed_s, _MOST_BETWEEN_LOOKS_S)
        if self._waited_s >= self._timeout_s:
            raise JobFailedError(
                f"{self._state(placed, needed)} after {self._waited_s:.0f} s "
                "(cluster.placement_timeout_s); the same command goes on from what is committed"
            )
        if self._waited_s >= self._tell_at_s:
            self._tell_at_s *= 2
            self._say(f"{self._state(placed, needed)}; waiting up to {self._timeout_s:g} s for it")
        return False

    def _state(self, placed: int, needed: int) -> str:
        return (
            f"Ray has a place for {placed} of the {needed} replicas that the job needs, each "
            f"{self._resources} on one node; free on its nodes: {self._room() or 'nothing'}"
        )
