"""The report's part on replicas: who was busy, waiting or dead, and when."""

from __future__ import annotations

import time
from typing import Any

from eevp_batch.report.figures import JobFigures
from eevp_batch.report.plots import time_ticks
from eevp_batch.report.text import duration, number, percent
from eevp_batch.report.timeline import STATES, Segment

_RUN_NAMES = {
    "job_finished": "finished",
    "job_interrupted": "interrupted",
    "job_failed": "failed",
    None: "no end in the log: running, or killed",
}


def replicas(figures: JobFigures) -> dict[str, Any]:
    """What the template needs for it."""
    timeline = figures.timeline
    end_s = timeline.end_s
    lanes = [
        _lane(name, segments, end_s)
        for name, segments in timeline.replicas.items()
        if segments and end_s > 0
    ]
    total = sum(timeline.seconds.values()) or 1.0
    drawn = {segment.state for lane in timeline.replicas.values() for segment in lane}
    used = [state for state in STATES if timeline.seconds.get(state) or state in drawn]
    return {
        "lanes": lanes,
        "lane_ticks": time_ticks(end_s) if end_s > 0 else [],
        "lane_note": _note(figures),
        "state_legend": [(f"s-{state}", state) for state in used],
        "state_rows": [
            [s, duration(timeline.seconds[s]), percent(timeline.seconds[s] / total)] for s in used
        ],
        "deaths": [
            [duration(d.at_s), d.replica, number(d.chunks), d.reason] for d in timeline.deaths
        ],
        "death_note": f"The first {len(timeline.deaths)} of {number(timeline.num_deaths)} deaths."
        if timeline.num_deaths > len(timeline.deaths)
        else "",
        "runs": [
            [
                str(place),
                clock(run.started_unix_s),
                duration(run.stop_s - run.start_s),
                "-" if run.replicas is None else str(run.replicas),
                ("retry, " if run.is_retry else "")
                + _RUN_NAMES.get(run.end, "")
                + (f": {run.reason}" if run.reason else ""),
            ]
            for place, run in enumerate(timeline.runs, 1)
        ],
        "slowest": [
            [str(chunk_id), replica, f"{taken_s:,.1f}", number(rows), number(tokens)]
            for taken_s, chunk_id, rows, tokens, replica in figures.chunks.slowest
        ],
    }


def clock(unix_s: float) -> str:
    """A moment in UTC, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))


def _lane(name: str, segments: list[Segment], end_s: float) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for segment in segments:
        length_s = segment.stop_s - segment.start_s
        seconds[segment.state] = seconds.get(segment.state, 0.0) + length_s
    return {
        "name": name,
        "label": f"{name}: " + ", ".join(f"{state} {duration(s)}" for state, s in seconds.items()),
        "segments": [
            {
                "colour": f"s-{segment.state}",
                "left": 100 * segment.start_s / end_s,
                "width": 100 * (segment.stop_s - segment.start_s) / end_s,
                "tip": f"{segment.state}, {duration(segment.start_s)} to "
                f"{duration(segment.stop_s)} ({duration(segment.stop_s - segment.start_s)})",
            }
            for segment in segments
        ],
    }


def _note(figures: JobFigures) -> str:
    timeline = figures.timeline
    hidden = timeline.num_replicas - len(timeline.replicas)
    more = f" {number(hidden)} more replicas are not drawn." if hidden else ""
    pauses = " Pauses between runs are left out." if len(timeline.runs) > 1 else ""
    return f"Busy: at least one chunk is leased to it.{pauses}{more}"
