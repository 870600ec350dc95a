"""Notices, while a job runs, that its exits change more than they may; and remembers it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from eevp_batch.records import AuditCounts
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.store import Store
from eevp_batch.tune.audited import audit_figures
from eevp_batch.tune.drift import DriftDetector


@dataclass(frozen=True, slots=True)
class Drift:
    """More tokens differ from full depth than may, from some row on.

    Attributes:
        rows: audited rows since it probably began.
        rows_before: audited rows before them; 0 where it was so from the beginning.
        disagreement: share of a row's tokens that differ, in the rows since.
        interval: of it, at 95 %, as if it had been known beforehand where those rows begin.
        bound: what is allowed.
        stops_exits: whether chunks that start from now on run at full depth.
    """

    rows: int
    rows_before: int
    disagreement: float
    interval: tuple[float, float]
    bound: float
    stops_exits: bool

    @property
    def text(self) -> str:
        """One sentence for a person."""
        then = "exits are off from now on" if self.stops_exits else "exits stay on"
        low, high = self.interval
        all_rows = self.rows + self.rows_before
        which = f"the last {self.rows:,} of {all_rows:,}" if self.rows_before else f"{all_rows:,}"
        return (
            f"audit: {self.disagreement:.2%} of the tokens of {which} audited rows differ from "
            f"full depth (95 % interval {low:.2%} to {high:.2%}); allowed: {self.bound:.2%}; {then}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


class AuditWatch:
    """Looks at the audited rows of committed chunks, as they are committed.

    A run of a job that stays within the bound tells of nothing but for a probability of 5 %
    (`tune.drift`), provided that it does not depend on what differs which chunk is committed first.
    A resumed run looks again at the chunks that earlier runs committed, now in the order of the
    plan, and goes on from there; as that is not quite the order of before, the 5 % are of each run.

    That exits were stopped is a file, so that a job that is resumed does not begin to trust them
    again.

    Args:
        spec: the job.
        store: its output folder.
        certified: the disagreement that a calibration allows; None without one.
    """

    def __init__(self, spec: JobSpec, store: Store, certified: float | None = None) -> None:
        self._store, self._stops_exits = store, spec.audit.stop_exits
        bound = certified if spec.audit.delta is None else spec.audit.delta
        self.is_stopped = self._stops_exits and store.exists(layout.EXITS_STOPPED)
        is_watching = spec.audit.full_depth_fraction > 0 and not self.is_stopped
        self._detector: DriftDetector | None = None
        if is_watching and bound is not None:
            self._detector = DriftDetector(bound)

    @property
    def is_watching(self) -> bool:
        """Whether there may be something to tell; it is told once."""
        return self._detector is not None

    def look(self, audited: AuditCounts) -> Drift | None:
        """What is to be told; None where nothing is, or where it has been told.

        Args:
            audited: the audited rows of a committed attempt.
        """
        detector = self._detector
        if detector is None:
            return None
        detector.add(audited)
        figures = audit_figures(detector.since) if detector.has_noticed else None
        if figures is None:
            return None
        drift = Drift(
            rows=figures.rows,
            rows_before=detector.rows - figures.rows,
            disagreement=figures.disagreement,
            interval=figures.disagreement_interval,
            bound=detector.bound,
            stops_exits=self._stops_exits,
        )
        if self._stops_exits:
            text = json.dumps(drift.to_json()) + "\n"
            self._store.write(layout.EXITS_STOPPED, text.encode())
            self.is_stopped = True
        self._detector = None
        return drift
