"""All that a job's report shows, gathered from its output folder alone."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.model_config import ModelConfig
from eevp_batch.records import Phase, RowId
from eevp_batch.report.row_sample import SEED, RowSample, sample_rows
from eevp_batch.report.savings import Savings, savings
from eevp_batch.report.summary import JobSummary, read_prompts, summarise, unreadable
from eevp_batch.report.timeline import Timeline, read_timeline
from eevp_batch.report.vocabulary import Vocabulary, find_model
from eevp_batch.storage import layout
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.plan import Plan, read_plan
from eevp_batch.storage.status import read_events
from eevp_batch.storage.store import Store

NUM_SLOWEST = 10
ERRORS_PER_CLASS = 5
MAX_ERROR_PARTS = 200


@dataclass
class ChunkTimes:
    """What the commit records tell beside the totals.

    Attributes:
        tokens: generated tokens by exit layer, by how their chunk ran.
        slowest: (seconds, chunk, rows, tokens, replica), slowest first.
        parts: data parts of committed chunks; `error_parts`: of error rows.
    """

    tokens: dict[Phase, Counter[int]] = field(default_factory=dict)
    slowest: list[tuple[float, int, int, int, str]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    error_parts: list[str] = field(default_factory=list)


@dataclass
class JobFigures:
    """A job, ready to be drawn.

    Attributes:
        spec_text: the resolved job file; empty where it is gone.
        success: what `_SUCCESS` holds; empty before the job has finished.
        model: the model's shape, where it is still at hand.
        vocabulary: of its tokenizer, where it is still at hand.
        errors: rows in error by class, some of each.
        prompts: of the rows to look at, by row id.
    """

    summary: JobSummary
    plan: Plan
    spec_text: str
    success: dict[str, Any]
    model: ModelConfig | None
    vocabulary: Vocabulary | None
    timeline: Timeline
    chunks: ChunkTimes
    sample: RowSample
    savings: Savings
    errors: dict[str, list[dict[str, Any]]]
    prompts: dict[RowId, str]

    def to_json(self) -> dict[str, Any]:
        """The summary, and the figures beside it, as plain JSON types."""
        return {
            **self.summary.to_json(),
            "timeline": self.timeline.to_json(),
            "sampled": self.sample.to_json(),
            "savings": self.savings.to_json(),
            "error_rows": self.errors,
        }


def gather(store: Store) -> JobFigures:
    """Read an output folder; nothing is written.

    Raises:
        UsageError: the folder holds no job.
        JobFailedError: its plan, a record or a part that was looked at is damaged.
    """
    summary, plan = summarise(store), read_plan(store)
    timeline = read_timeline(read_events(store))
    chunks = _chunk_times(store, plan)
    model = find_model(plan)
    vocabulary = Vocabulary.read(Path(model.path)) if model is not None else None
    sample = sample_rows(store, chunks.parts, plan.kept_columns, summary.exit_layers, vocabulary)
    prompt_tokens = summary.totals.prompt_tokens * plan.num_samples
    return JobFigures(
        summary=summary,
        plan=plan,
        spec_text=_text(store, layout.RESOLVED_SPEC),
        success=_success(store),
        model=model,
        vocabulary=vocabulary,
        timeline=timeline,
        chunks=chunks,
        sample=sample,
        savings=savings(
            plan.fields,
            summary.exit_layers,
            chunks.tokens,
            prompt_tokens,
            model,
            timeline.working_s,
        ),
        errors=_error_rows(store, chunks.error_parts),
        prompts=_prompts(plan, sample),
    )


def _chunk_times(store: Store, plan: Plan) -> ChunkTimes:
    found = ChunkTimes()
    for chunk in Committer(store, plan).chunks():
        for attempt in chunk.attempts:
            _count_attempt(found, attempt)
        if chunk.last.errors_path is not None:
            found.error_parts.append(chunk.last.errors_path)
    found.slowest.sort(reverse=True)
    return found


def _count_attempt(found: ChunkTimes, attempt: Attempt) -> None:
    tokens = found.tokens.setdefault(attempt.phase, Counter())
    tokens.update(attempt.stats.exit_histogram)
    taken_s = max(0.0, attempt.finished_unix_s - attempt.started_unix_s)
    rows, made = attempt.stats.rows, attempt.stats.generated_tokens
    entry = (taken_s, attempt.chunk_id, rows, made, attempt.replica)
    if len(found.slowest) < NUM_SLOWEST:
        heapq.heappush(found.slowest, entry)
    else:
        heapq.heappushpop(found.slowest, entry)
    if attempt.data_path is not None:
        found.parts.append(attempt.data_path)


def _error_rows(store: Store, parts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Some rows of each class, from at most so many parts in an order that a fixed seed draws."""
    order = sorted(parts)
    random.Random(SEED).shuffle(order)
    found: dict[str, list[dict[str, Any]]] = {}
    for rel in order[:MAX_ERROR_PARTS]:
        try:
            with store.open_input(rel) as source:
                rows = pq.read_table(source).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise unreadable(store, rel, error) from error
        for row in rows:
            some = found.setdefault(row["error_class"], [])
            if len(some) < ERRORS_PER_CLASS:
                some.append(row)
    return dict(sorted(found.items()))


def _prompts(plan: Plan, sample: RowSample) -> dict[RowId, str]:
    by_chunk: dict[int, set[RowId]] = {}
    for row in sample.shown:
        by_chunk.setdefault(row["chunk_id"], set()).add(row["row_id"])
    prompts: dict[RowId, str] = {}
    for chunk_id, row_ids in by_chunk.items():
        prompts |= read_prompts(plan, chunk_id, row_ids)
    return prompts


def _text(store: Store, rel: str) -> str:
    try:
        return store.read(rel).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _success(store: Store) -> dict[str, Any]:
    try:
        found = json.loads(_text(store, layout.SUCCESS) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
