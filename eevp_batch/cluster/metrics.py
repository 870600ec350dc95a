"""What a job tells Prometheus, through the metrics endpoint that Ray has on every node.

All names, units and meanings are in `METRICS`, and nowhere else. Nothing here is recorded per token
or per row: replicas and the coordinator hand over what they count anyway, about once a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util import metrics as ray_metrics

from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.progress import Progress, Recoveries
from eevp_batch.errors import RowSkippedError
from eevp_batch.records import ChunkStats

JOB_TAGS = ("job_name", "run_id")
REPLICA_TAGS = (*JOB_TAGS, "replica")
CHUNK_SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0]

_Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    Attributes:
        kind: what Prometheus takes it for.
        unit: of its values.
        text: what it says, for people.
        owner: the tags that say whose it is.
        tag: what tells its series apart beside the owner; None: there is one.
    """

    name: str
    kind: _Kind
    unit: str
    text: str
    owner: tuple[str, ...]
    tag: str | None = None

    @property
    def tags(self) -> tuple[str, ...]:
        """All of its tags."""
        return self.owner if self.tag is None else (*self.owner, self.tag)

    @property
    def exported(self) -> tuple[str, ...]:
        """What Prometheus finds it as."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (f"{name}_total",) if self.kind == "counter" else (name,)


def _job(name: str, kind: _Kind, unit: str, text: str, tag: str | None = None) -> Definition:
    return Definition(f"eevp_{name}", kind, unit, text, JOB_TAGS, tag)


def _replica(name: str, kind: _Kind, unit: str, text: str, tag: str | None = None) -> Definition:
    return Definition(f"eevp_{name}", kind, unit, text, REPLICA_TAGS, tag)


ROWS = _job(
    "rows",
    "gauge",
    "rows",
    "Input rows: committed as ok, error or skipped, finished in chunks under way (open), or left.",
    "status",
)
ERROR_ROWS = _job("error_rows", "gauge", "rows", "Committed error rows by class.", "error_class")
CHUNKS = _job("chunks", "gauge", "chunks", "Chunks committed, leased or pending.", "status")
REPLICAS = _job("replicas", "gauge", "replicas", "Replicas ready or starting.", "status")
ETA = _job("eta_seconds", "gauge", "seconds", "Seconds left at this run's rate so far.")
LAST_PROGRESS = _job(
    "last_progress_timestamp_seconds",
    "gauge",
    "seconds since 1970",
    "When a token, a finished row or a commit was last heard of.",
)
# Gauges, although they only grow: Ray exports no counter before its first increment, and whoever
# asks Prometheus for an increase then misses that.
RETRIES = _job(
    "retries",
    "gauge",
    "chunks, rows or steps",
    "What was done again in this run: chunks of replicas that died or left (replica_died), "
    "attempts that came too late (attempt_discarded), steps that ran out of memory "
    "(memory_shortage); and rows given up because they kill replicas (row_set_aside).",
    "reason",
)
DEATHS = _job("replica_deaths", "gauge", "replicas", "Replicas that died in this run.")
COORDINATOR = _job(
    "coordinator_seconds",
    "counter",
    "seconds",
    "Time that the coordinator spent on its own work, or in commits and the event log (storage).",
    "activity",
)

TOKENS = _replica(
    "tokens", "counter", "tokens", "Generated tokens by the layer they left after.", "exit_layer"
)
LAYERS = _replica(
    "layers", "counter", "layers x tokens", "Layers of generated tokens: run or skipped.", "state"
)
BATCHES = _replica("batches", "counter", "batches", "Batches run, by depth.", "depth")
BATCH_ROWS = _replica(
    "batch_rows", "counter", "sequences", "Sequences in these batches, by depth.", "depth"
)
QUEUE = _replica(
    "queue_length",
    "gauge",
    "sequences",
    "Who waits: at a depth, for memory, or (line) before the engine.",
    "queue",
)
KEPT_IDS = _replica(
    "kept_ids", "gauge", "ids", "K, the ids kept where the vocabulary is cut; 0: it is not."
)
DEEP_TOKENS = _replica(
    "deep_tokens",
    "counter",
    "tokens",
    "Tokens chosen from the whole vocabulary after the last layer, by whether they had been kept.",
    "kept",
)
KV_PAGES = _replica(
    "kv_pages", "gauge", "pages", "Pages of keys and values, used or free.", "state"
)
DEVICE_IDLE = _replica(
    "device_idle_seconds",
    "counter",
    "seconds",
    "Time since the engine was built in which no batch ran on the replica's devices.",
)
CHUNK = _replica(
    "chunk_seconds",
    "histogram",
    "seconds",
    "From a chunk's start on its replica to its attempt file; chunks overlap.",
)

METRICS = (
    *(ROWS, ERROR_ROWS, CHUNKS, REPLICAS, ETA, LAST_PROGRESS, RETRIES, DEATHS, COORDINATOR),
    *(TOKENS, LAYERS, BATCHES, BATCH_ROWS, QUEUE, KEPT_IDS, DEEP_TOKENS, KV_PAGES, DEVICE_IDLE),
    CHUNK,
)


class _Publisher:
    """Metrics of one owner in this process.

    Args:
        owner: values of the tags that say whose they are.
    """

    def __init__(self, owner: Mapping[str, str]) -> None:
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            if metric.owner == tuple(owner):
                self._metrics[metric.name] = _made(metric).set_default_tags(dict(owner))
        self._counted: dict[tuple[str, str | None], float] = {}

    def set(self, metric: Definition, value: float, tag: object = None) -> None:
        """Set a gauge."""
        self._metrics[metric.name].set(value, _tags(metric, tag))

    def count_to(self, metric: Definition, value: float, tag: object = None) -> None:
        """Bring a counter up to a value; one that has been higher stays where it is."""
        key = (metric.name, None if tag is None else str(tag))
        if value > self._counted.get(key, 0.0):
            more = value - self._counted.get(key, 0.0)
            self._metrics[metric.name].inc(more, _tags(metric, tag))
            self._counted[key] = value

    def observe(self, metric: Definition, value: float) -> None:
        """Add to a histogram."""
        self._metrics[metric.name].observe(value)


class ReplicaMetrics:
    """What a replica publishes, from its own process.

    Args:
        job_name: the job's name.
        run_id: of its plan.
        replica: its name; its successors in the same slot have the same tags.
    """

    def __init__(self, job_name: str, run_id: str, replica: str) -> None:
        slot = replica.removeprefix("eevp-").partition(".")[0]
        values = (job_name, run_id, slot)
        self._publisher = _Publisher(dict(zip(REPLICA_TAGS, values, strict=True)))

    def publish(self, found: LoopProgress) -> None:
        """Publish the counters and the state of the engine."""
        count, put, vitals = self._publisher.count_to, self._publisher.set, found.vitals
        for layer, tokens in found.exit_histogram.items():
            count(TOKENS, tokens, layer)
        run = sum(layer * tokens for layer, tokens in found.exit_histogram.items())
        if vitals.num_layers:
            count(LAYERS, run, "run")
            count(LAYERS, vitals.num_layers * found.tokens - run, "skipped")
        for depth, steps in vitals.steps.items():
            count(BATCHES, steps, depth)
            count(BATCH_ROWS, vitals.rows[depth], depth)
        for depth, length in enumerate(vitals.waiting):
            put(QUEUE, length, f"depth {depth}")
        put(QUEUE, vitals.arrivals, "memory")
        put(QUEUE, found.waiting_prompts, "line")
        put(KEPT_IDS, vitals.num_kept_ids or 0)
        count(DEEP_TOKENS, vitals.kept.kept, "yes")
        count(DEEP_TOKENS, vitals.kept.tokens - vitals.kept.kept, "no")
        put(KV_PAGES, vitals.pages_in_use, "used")
        put(KV_PAGES, vitals.pages - vitals.pages_in_use, "free")
        count(DEVICE_IDLE, found.idle_s)

    def chunk_is_written(self, seconds: float) -> None:
        """A chunk's attempt file is there, so many seconds after its start."""
        self._publisher.observe(CHUNK, seconds)


class JobMetrics:
    """What the coordinator publishes.

    Args:
        job_name: the job's name.
        run_id: of its plan.
    """

    def __init__(self, job_name: str, run_id: str) -> None:
        self._publisher = _Publisher(dict(zip(JOB_TAGS, (job_name, run_id), strict=True)))
        self._moved: tuple[int, ...] = ()

    def publish(self, found: Progress, totals: ChunkStats, recoveries: Recoveries) -> None:
        """Publish how far the job is.

        Args:
            found: the job now.
            totals: of the committed chunks.
            recoveries: what was put right in this run.
        """
        count, put = self._publisher.count_to, self._publisher.set
        skipped = totals.error_classes[RowSkippedError.__name__]
        open_rows = max(0, found.rows_done - totals.rows)
        put(ROWS, totals.rows_ok, "ok")
        put(ROWS, totals.rows_error - skipped, "error")
        put(ROWS, skipped, "skipped")
        put(ROWS, open_rows, "open")
        put(ROWS, max(0, found.rows_total - totals.rows - open_rows), "left")
        for error_class, rows in totals.error_classes.items():
            put(ERROR_ROWS, rows, error_class)
        put(CHUNKS, found.chunks_committed, "committed")
        put(CHUNKS, found.chunks_leased, "leased")
        put(CHUNKS, found.chunks_pending, "pending")
        put(REPLICAS, found.replicas_ready, "ready")
        put(REPLICAS, found.replicas - found.replicas_ready, "starting")
        if found.eta_s is not None:
            put(ETA, found.eta_s)
        moved = (found.chunks_committed, found.tokens, found.rows_done)
        if moved != self._moved:
            self._moved = moved
            put(LAST_PROGRESS, time.time())
        put(RETRIES, recoveries.chunks_returned, "replica_died")
        put(RETRIES, recoveries.attempts_discarded, "attempt_discarded")
        put(RETRIES, recoveries.memory_shortages, "memory_shortage")
        put(RETRIES, recoveries.rows_set_aside, "row_set_aside")
        put(DEATHS, recoveries.replica_deaths)
        count(COORDINATOR, found.coordinator_s, "work")
        count(COORDINATOR, found.storage_s, "storage")


def _tags(metric: Definition, value: object) -> dict[str, str] | None:
    return None if metric.tag is None else {metric.tag: str(value)}


def _made(metric: Definition) -> Any:
    text = f"{metric.text} Unit: {metric.unit}."
    if metric.kind == "histogram":
        return ray_metrics.Histogram(metric.name, text, CHUNK_SECONDS, metric.tags)
    kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
    return kind(metric.name, text, metric.tags)
