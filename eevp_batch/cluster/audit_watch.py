"""Notices, while a job runs, that its exits change more than they may; and remembers it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from eevp_batch.records import AuditCounts
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.store import Store
from eevp_batch.tune.audited import audit_figures, exceeds


@dataclass(frozen=True, slots=True)
class Drift:
    """More tokens differ from full depth than may.

    Attributes:
        rows: audited rows that say so.
        disagreement: share of a row's tokens that differ.
        interval: of it, at 95 %.
        bound: what is allowed.
        stops_exits: whether chunks that start from now on run at full depth.
    """

    rows: int
    disagreement: float
    interval: tuple[float, float]
    bound: float
    stops_exits: bool

    @property
    def text(self) -> str:
        """One sentence for a person."""
        then = "exits are off from now on" if self.stops_exits else "exits stay on"
        low, high = self.interval
        return (
            f"audit: {self.disagreement:.2%} of the tokens of {self.rows} audited rows differ from "
            f"full depth (95 % interval {low:.2%} to {high:.2%}); allowed: {self.bound:.2%}; {then}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


class AuditWatch:
    """Looks at the audited rows of all committed chunks.

    That exits were stopped is a file, so that a job that is resumed does not begin to trust them
    again.

    Args:
        spec: the job.
        store: its output folder.
        certified: the disagreement that a calibration allows; None without one.
    """

    def __init__(self, spec: JobSpec, store: Store, certified: float | None = None) -> None:
        self._store, self._stops_exits = store, spec.audit.stop_exits
        self.bound = certified if spec.audit.delta is None else spec.audit.delta
        self.is_stopped = self._stops_exits and store.exists(layout.EXITS_STOPPED)
        self._has_told = self.is_stopped

    def look(self, counts: AuditCounts) -> Drift | None:
        """What is to be told; None where nothing is, or where it has been told.

        Args:
            counts: all audited rows so far.
        """
        if self._has_told or self.bound is None or not exceeds(counts, self.bound):
            return None
        figures = audit_figures(counts)
        if figures is None:
            return None
        drift = Drift(
            rows=figures.rows,
            disagreement=figures.disagreement,
            interval=figures.disagreement_interval,
            bound=self.bound,
            stops_exits=self._stops_exits,
        )
        if self._stops_exits:
            text = json.dumps(drift.to_json()) + "\n"
            self._store.write(layout.EXITS_STOPPED, text.encode())
            self.is_stopped = True
        self._has_told = True
        return drift
