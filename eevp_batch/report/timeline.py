"""A job's event log as a story: its runs, what each replica did when, and how fast work was done.

Time is seconds of running: where a job was interrupted and resumed, the pause is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from eevp_batch.report.time_bins import TimeBins
from eevp_batch.storage.status import RETRY_START, RUN_STARTS

State = Literal["starting", "busy", "learning", "waiting", "dead"]
STATES: tuple[State, ...] = ("starting", "busy", "learning", "waiting", "dead")

MAX_REPLICAS = 64
MAX_SEGMENTS = 600
MAX_DEATHS = 50

_RUN_ENDS = ("job_finished", "job_interrupted", "job_failed")


class Segment(NamedTuple):
    """A stretch of time in which a replica was in one state, in seconds of running."""

    state: State
    start_s: float
    stop_s: float


class Death(NamedTuple):
    """A replica that died."""

    at_s: float
    replica: str
    reason: str
    chunks: int


@dataclass
class Run:
    """One run of the job.

    Attributes:
        started_unix_s: wall clock.
        start_s, stop_s: in seconds of running.
        is_retry: whether it tries error rows again, all of which were committed before.
        end: the event that it ended with; None where it was killed or still runs.
    """

    started_unix_s: float
    start_s: float
    replicas: int | None
    is_retry: bool = False
    stop_s: float = 0.0
    end: str | None = None
    reason: str | None = None
    first_ready_s: float | None = None
    last_commit_s: float | None = None

    @property
    def working_s(self) -> float:
        """Seconds from the first replica's readiness to the last commit."""
        if self.first_ready_s is None or self.last_commit_s is None:
            return 0.0
        return max(0.0, self.last_commit_s - self.first_ready_s)


@dataclass
class _Replica:
    """A replica's segments so far, and what it is doing."""

    segments: list[Segment] = field(default_factory=list)
    state: State | None = None
    since_s: float = 0.0
    in_flight: set[int] = field(default_factory=set)
    seconds: dict[State, float] = field(default_factory=lambda: dict.fromkeys(STATES, 0.0))

    def turn(self, state: State | None, at_s: float) -> None:
        """End the state it is in and begin another; None ends it for good."""
        if state == self.state:
            return
        if self.state is not None and (at_s > self.since_s or self.state == "dead"):
            self.segments.append(Segment(self.state, self.since_s, at_s))
            self.seconds[self.state] += at_s - self.since_s
            if len(self.segments) > MAX_SEGMENTS:
                self.segments = list(_joined(self.segments))
        self.state, self.since_s = state, at_s


@dataclass
class Timeline:
    """What the event log tells.

    Attributes:
        replicas: segments by name; at most `MAX_REPLICAS`, the first that appeared.
        num_replicas: all that appeared.
        seconds: of all replicas together, by state.
        deaths: the first `MAX_DEATHS`; `num_deaths` counts all.
        tokens: generated tokens, each chunk's spread over the time from its lease to its commit.
        rows: rows at the moment of their first commit, as far as the log tells.
        machines: what replicas said of their machines, and how many said so.
    """

    runs: list[Run] = field(default_factory=list)
    replicas: dict[str, list[Segment]] = field(default_factory=dict)
    num_replicas: int = 0
    seconds: dict[State, float] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    num_deaths: int = 0
    discarded: int = 0
    tokens: TimeBins = field(default_factory=TimeBins)
    rows: TimeBins = field(default_factory=TimeBins)
    machines: list[tuple[Mapping[str, Any], int]] = field(default_factory=list)

    @property
    def end_s(self) -> float:
        """Seconds of running, over all runs."""
        return self.runs[-1].stop_s if self.runs else 0.0

    @property
    def working_s(self) -> float | None:
        """Seconds in which replicas worked; None where the log tells of no commit."""
        return sum(run.working_s for run in self.runs) or None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: the sums, not the drawing."""
        return {
            "runs": [vars(run) | {"working_s": run.working_s} for run in self.runs],
            "replica_seconds": {state: round(s, 3) for state, s in self.seconds.items()},
            "replicas": self.num_replicas,
            "replica_deaths": self.num_deaths,
            "attempts_discarded": self.discarded,
            "machines": [{"replicas": count, **dict(found)} for found, count in self.machines],
        }


def read_timeline(events: Iterable[Mapping[str, Any]]) -> Timeline:
    """One pass over the events; memory grows with the replicas, not with the chunks."""
    reader = _Reader()
    for event in events:
        if isinstance(event.get("unix_s"), (int, float)):
            reader.take(event)
    return reader.finish()


class _Reader:
    """Takes events one by one."""

    def __init__(self) -> None:
        self.found = Timeline()
        self._replicas: dict[str, _Replica] = {}
        self._leased_s: dict[tuple[str, int], float] = {}
        self._set_aside: set[int] = set()
        self._at_s = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Bring the story up to one event."""
        kind, unix_s = str(event.get("event")), float(event["unix_s"])
        if kind == "chunk_set_aside":  # told before the run begins that does it again
            self._set_aside.add(event["chunk_id"])
            return
        if kind in RUN_STARTS or not self.found.runs:
            self._begin(unix_s, event.get("replicas"), kind == RETRY_START)
        run = self.found.runs[-1]
        self._at_s = max(self._at_s, run.start_s + unix_s - run.started_unix_s)
        run.stop_s = self._at_s
        name = str(event.get("replica", ""))
        replica = self._replicas.setdefault(name, _Replica()) if name else _Replica()
        if kind == "replica_placed":
            replica.turn("starting", self._at_s)
        elif kind == "replica_ready":
            self._ready(run, replica, event.get("machine"))
        elif kind == "replica_dead":
            self._dead(name, replica, event)
        elif kind == "chunk_leased":
            replica.in_flight.add(event["chunk_id"])
            self._leased_s[name, event["chunk_id"]] = self._at_s
            if replica.state != "learning":
                replica.turn("busy", self._at_s)
        elif kind in ("chunk_committed", "attempt_discarded", "chunk_given_up"):
            self._ended(run, name, replica, event)
        elif kind == "replica_left":
            self._gone(name, replica, None)
        elif kind == "learning_started":
            replica.turn("learning", self._at_s)
        elif kind in ("exits_learned", "learning_failed"):
            for other in self._replicas.values():
                if other.state == "learning":
                    self._settle(other)
        elif kind in _RUN_ENDS:
            run.end, run.reason = kind, event.get("reason")
            self._end_all()

    def finish(self) -> Timeline:
        """What was found."""
        self._end_all()
        named = {name: replica.segments for name, replica in sorted(self._replicas.items())}
        for state in STATES:
            self.found.seconds[state] = sum(r.seconds[state] for r in self._replicas.values())
        self.found.num_replicas = len(named)
        self.found.replicas = dict(list(named.items())[:MAX_REPLICAS])
        return self.found

    def _begin(self, unix_s: float, replicas: Any, is_retry: bool) -> None:
        self._end_all()
        count = replicas if isinstance(replicas, int) else None
        self.found.runs.append(Run(unix_s, self._at_s, count, is_retry, self._at_s))

    def _ready(self, run: Run, replica: _Replica, machine: Any) -> None:
        if replica.state is None:
            replica.state, replica.since_s = "starting", run.start_s
        replica.turn("waiting", self._at_s)
        if run.first_ready_s is None:
            run.first_ready_s = self._at_s
        if isinstance(machine, dict):
            self._count_machine(machine)

    def _dead(self, name: str, replica: _Replica, event: Mapping[str, Any]) -> None:
        self.found.num_deaths += 1
        if len(self.found.deaths) < MAX_DEATHS:
            chunks = len(replica.in_flight)
            reason = str(event.get("reason", ""))
            self.found.deaths.append(Death(self._at_s, name, reason, chunks))
        self._gone(name, replica, "dead")

    def _gone(self, name: str, replica: _Replica, state: State | None) -> None:
        for chunk_id in replica.in_flight:
            self._leased_s.pop((name, chunk_id), None)
        replica.in_flight.clear()
        replica.turn(state, self._at_s)

    def _ended(self, run: Run, name: str, replica: _Replica, event: Mapping[str, Any]) -> None:
        replica.in_flight.discard(event["chunk_id"])
        leased_s = self._leased_s.pop((name, event["chunk_id"]), self._at_s)
        if event["event"] == "chunk_committed":
            run.last_commit_s = self._at_s
            self.found.tokens.add(leased_s, self._at_s, event.get("generated_tokens", 0))
            if not run.is_retry and event["chunk_id"] not in self._set_aside:
                rows = event.get("rows_ok", 0) + event.get("rows_error", 0)
                self.found.rows.add(self._at_s, self._at_s, rows)
            self._set_aside.discard(event["chunk_id"])
        elif event["event"] == "attempt_discarded":
            self.found.discarded += 1
        if replica.state == "busy":
            self._settle(replica)

    def _settle(self, replica: _Replica) -> None:
        replica.turn("busy" if replica.in_flight else "waiting", self._at_s)

    def _end_all(self) -> None:
        for replica in self._replicas.values():
            replica.turn(None, self._at_s)
            replica.in_flight.clear()
        self._leased_s.clear()

    def _count_machine(self, machine: Mapping[str, Any]) -> None:
        for number, (known, count) in enumerate(self.found.machines):
            if known == machine:
                self.found.machines[number] = (known, count + 1)
                return
        self.found.machines.append((machine, 1))


def _joined(segments: list[Segment]) -> Iterator[Segment]:
    """Neighbours two by two, each pair in the state of its longer part; a death stays seen."""
    for first, second in zip(segments[::2], segments[1::2], strict=False):
        longer = max(first, second, key=lambda s: (s.state == "dead", s.stop_s - s.start_s))
        yield Segment(longer.state, first.start_s, second.stop_s)
    if len(segments) % 2:
        yield segments[-1]
