"""A job in numbers, from its output folder alone: finished, running or interrupted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.errors import JobFailedError
from eevp_batch.records import ChunkStats, RowId
from eevp_batch.storage import layout
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.commit_record import recorded
from eevp_batch.storage.plan import Plan, read_plan
from eevp_batch.storage.status import State, Status, read_status
from eevp_batch.storage.store import Store
from eevp_batch.tune.audited import AuditFigures, audit_figures

NUM_SAMPLES = 3

_SAMPLE_COLUMNS = [
    "row_id",
    "sample_index",
    "text",
    "generated_tokens",
    "finish_reason",
    "mean_exit_layer",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation to look at.

    Attributes:
        prompt: the row's prompt or last message; None where a template made it, or where the
            input is gone.
    """

    row_id: RowId
    sample_index: int
    prompt: str | None
    text: str
    generated_tokens: int
    finish_reason: str
    mean_exit_layer: float | None


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What a person wants to know of a job.

    Attributes:
        out: output folder or URI.
        rows_in: planned rows.
        totals: counters of the committed chunks.
        exit_layers: the job's exit layers, the model's last layer among them.
        tokens_per_s: as in `Status`.
        audit: what audited rows say; None without any.
        learning, drift: as in `Status`.
        samples: at most three, spread over the committed parts.
        written: paths of what the job has left so far.
    """

    out: str
    run_id: str
    state: State
    reason: str | None
    model: str
    rows_in: int
    chunks: int
    chunks_done: int
    totals: ChunkStats
    exit_layers: list[int]
    tokens_per_s: float | None
    audit: AuditFigures | None
    learning: str | None
    drift: dict[str, Any] | None
    samples: list[Sample]
    written: list[str]

    @property
    def num_layers(self) -> int:
        return self.exit_layers[-1]

    @property
    def layers_skipped_fraction(self) -> float | None:
        """Share of (generated tokens x layers) that the exits skipped; None before a token."""
        mean = self.totals.mean_exit_layer
        return None if mean is None else 1.0 - mean / self.num_layers

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return {
            **values,
            "totals": self.totals.to_json(),
            "audit": self.audit and self.audit.to_json(),
            "num_layers": self.num_layers,
            "mean_exit_layer": self.totals.mean_exit_layer,
            "layers_skipped_fraction": self.layers_skipped_fraction,
            "kept_recall": self.totals.kept.recall,
            "samples": [
                {name: getattr(sample, name) for name in sample.__slots__}
                for sample in self.samples
            ],
        }


def summarise(store: Store) -> JobSummary:
    """Read plan, commit records, events and three generations; nothing is written.

    Raises:
        UsageError: the folder holds no job.
        JobFailedError: its plan, a record or a sampled part is damaged.
    """
    plan = read_plan(store)
    status = read_status(store)
    return JobSummary(
        out=store.text,
        run_id=plan.run_id,
        state=status.state,
        reason=status.reason,
        model=plan.model,
        rows_in=plan.num_rows,
        chunks=status.chunks_total,
        chunks_done=status.chunks_done,
        totals=status.totals,
        exit_layers=sorted({*plan.fields["exit.layers"], *status.totals.exit_histogram}),
        tokens_per_s=status.tokens_per_s,
        audit=audit_figures(status.totals.audit),
        learning=status.learning,
        drift=status.drift,
        samples=read_samples(store, plan, NUM_SAMPLES),
        written=_written(store),
    )


def status_json(status: Status) -> dict[str, Any]:
    """A status as plain JSON types, with what audited rows say so far."""
    figures = audit_figures(status.totals.audit)
    return {**status.to_json(), "audit": figures and figures.to_json()}


def read_samples(store: Store, plan: Plan, count: int) -> list[Sample]:
    """Some generations, spread over the committed parts and over the rows of each.

    Args:
        store: output folder.
        plan: its plan.
        count: how many; fewer where there are fewer generations.

    Raises:
        JobFailedError: a part cannot be read.
    """
    done, patches = recorded(store)
    keys = filter(None, map(layout.part_key, store.names(layout.DATA_DIR)))
    parts = sorted((c, patch) for c, patch in keys if c in done and patch <= patches[c])
    samples: dict[tuple[RowId, int], Sample] = {}
    for turn in range(count if parts else 0):
        chunk_id, patch = parts[turn * len(parts) // count]
        sample = _read_sample(store, plan, chunk_id, patch, turn / count)
        samples.setdefault((sample.row_id, sample.sample_index), sample)
    return list(samples.values())


def _read_sample(store: Store, plan: Plan, chunk_id: int, patch: int, place: float) -> Sample:
    """The generation at `place` (0..1) of a part."""
    rel = layout.data_part(chunk_id, patch)
    try:
        with store.open_input(rel) as source:
            table = pq.read_table(source, columns=_SAMPLE_COLUMNS)
        row = table.slice(int(place * table.num_rows), 1).to_pylist()[0]
    except (OSError, pa.ArrowException, UnicodeDecodeError, LookupError) as error:
        raise unreadable(store, rel, error) from error
    prompts = read_prompts(plan, chunk_id, [row["row_id"]])
    return Sample(prompt=prompts.get(row["row_id"]), **row)


def unreadable(store: Store, rel: str, error: Exception) -> JobFailedError:
    """What to say of a part that is damaged or gone."""
    why = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
    return JobFailedError(
        f"{store.text}: {rel}: cannot be read ({why}); `eevp-batch verify` tells more"
    )


def read_prompts(plan: Plan, chunk_id: int, row_ids: Collection[RowId]) -> dict[RowId, str]:
    """Prompts or last messages of some rows of a chunk; a row that has none is left out.

    There are none where a template made the prompts, or the input is not what was planned any more.

    Args:
        plan: the job's.
        chunk_id: where the rows are.
        row_ids: which rows.
    """
    column = plan.fields["input.messages_column"] or plan.fields["input.prompt_column"]
    if column is None:
        return {}
    try:
        table = read_chunk(plan, plan.chunks[chunk_id], [column])
    except JobFailedError:  # moved or changed: a report is about the output
        return {}
    rows = (row for row in iter_rows(table) if row[plan.id_column] in row_ids)
    prompts = {row[plan.id_column]: _text_of(row[column]) for row in rows}
    return {row_id: text for row_id, text in prompts.items() if text is not None}


def _text_of(prompt: Any) -> str | None:
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content")
    return prompt if isinstance(prompt, str) else None


def _written(store: Store) -> list[str]:
    places = [layout.DATA_DIR, layout.ERRORS_DIR, layout.SUCCESS, layout.RESOLVED_SPEC]
    places.append(layout.PLAN)
    folders = (layout.DATA_DIR, layout.ERRORS_DIR)
    there = [p for p in places if (any(store.names(p)) if p in folders else store.exists(p))]
    return [f"{store.text.rstrip('/')}/{place}" for place in there]
