"""Rows of a job, drawn at random: prompts of its input, or rows that were run at full depth.

At random and not in blocks: a certificate takes the rows to be drawn as the job's rows are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.errors import InputError, JobFailedError, RowError, UsageError
from eevp_batch.records import RowId
from eevp_batch.spec import InputSpec
from eevp_batch.storage import layout
from eevp_batch.storage.chunks import iter_rows, read_chunk, table_ids
from eevp_batch.storage.commit_record import patch_counts
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.listing import list_inputs
from eevp_batch.storage.plan import Chunk, Plan, read_plan
from eevp_batch.storage.store import Store
from eevp_batch.tune.states import Row, prompt_key

_BATCH_ROWS = 1 << 10
# What has to be equal for a full-depth output to be what the job itself would give without exits.
_SAME = ("model.", "prompt.", "sampling.", "input.messages_column", "input.prompt_column")
_FREE = ("sampling.n", "sampling.seed")


def drawn_prompts(
    source: InputSpec,
    encoder: PromptEncoder,
    num_rows: int,
    seed: int,
    without: Iterable[str] = (),
) -> list[list[int]]:
    """Token ids of random prompts, in random order; rows that cannot be encoded are left out.

    Args:
        source: input of the job.
        encoder: from a row to token ids.
        num_rows: how many rows; fewer where there are fewer.
        seed: of the choice.
        without: keys of prompts that are left out, see `prompt_key`.

    Raises:
        InputError: no such file, or no row that can be encoded.
    """
    files = [InputParquet.open(path) for path in list_inputs(source.path)]
    total = min(sum(file.num_rows for file in files), source.limit or 1 << 62)
    rng, known = random.Random(seed), set(without)
    picks = sorted(rng.sample(range(total), min(num_rows + len(known), total)))
    found = []
    for row in _rows_at(files, encoder.columns, picks):
        try:
            found.append(encoder.encode(row))
        except RowError:
            continue
    found = [token_ids for token_ids in found if prompt_key(token_ids) not in known]
    if not found:
        allowed = "one that can be encoded and that nothing was fitted to"
        raise InputError(str(source.path), "input", "no row to draw", allowed)
    rng.shuffle(found)
    return found[:num_rows]


def _rows_at(
    files: Sequence[InputParquet], columns: Sequence[str], picks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows by their numbers over all files, increasing."""
    start = 0
    for file in files:
        group_start = start
        for group in range(file.metadata.num_row_groups):
            stop = group_start + int(file.metadata.row_group(group).num_rows)
            inside = [pick - start for pick in picks if group_start <= pick < stop]
            if inside:
                yield from _rows_of_file(file, columns, inside)
            group_start = stop
        start += file.num_rows


def _rows_of_file(
    file: InputParquet, columns: Sequence[str], picks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows by their numbers in the file, increasing."""
    start = picks[0]
    for batch in file.batches(columns, start, picks[-1] + 1, _BATCH_ROWS):
        taken = [pick - start for pick in picks if start <= pick < start + batch.num_rows]
        yield from iter_rows(pa.Table.from_batches([batch]).take(taken))
        start += batch.num_rows


def output_rows(
    out: str,
    fields: Mapping[str, Any],
    encoder: PromptEncoder,
    num_rows: int,
    seed: int,
    without: Iterable[str] = (),
) -> list[Row]:
    """Random rows of a finished output that ran at full depth, in random order.

    Args:
        out: output folder or URI.
        fields: of the job's own plan, by dotted name.
        encoder: of the job.
        num_rows: how many rows; fewer where there are fewer, or where rows are in error.
        seed: of the choice.
        without: keys of prompts that are left out, see `prompt_key`.

    Raises:
        UsageError: it is not finished, had exits, or is of a job that differs.
        JobFailedError: a part or the input cannot be read.
    """
    store = Store.open(out)
    plan = read_plan(store)
    if not store.exists(layout.SUCCESS):
        raise UsageError(f"{out}: found a job that is not finished; allowed: one that is")
    _check_same(out, plan.fields, fields)
    rng, known = random.Random(seed), set(without)
    picks = sorted(rng.sample(range(plan.num_rows), min(num_rows + len(known), plan.num_rows)))
    ends = list(itertools.accumulate(chunk.num_rows for chunk in plan.chunks))
    found, start, patches = [], 0, patch_counts(store)
    for chunk, stop in zip(plan.chunks, ends, strict=True):
        inside = [pick - start for pick in picks if start <= pick < stop]
        if inside:
            found += _rows_of_chunk(store, plan, chunk, encoder, inside, patches[chunk.chunk_id])
        start = stop
    found = [row for row in found if prompt_key(row.prompt_ids) not in known]
    if not found:
        raise UsageError(f"{out}: found no generation that nothing was fitted to; allowed: some")
    rng.shuffle(found)
    return found[:num_rows]


def _check_same(out: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if theirs.get("exit.mode") != "off":
        found = theirs.get("exit.mode")
        raise UsageError(f"{out}: exit.mode: found {found}; allowed: off, an output at full depth")
    for name in sorted({*theirs, *ours}):
        if name.startswith(_SAME) and name not in _FREE and theirs.get(name) != ours.get(name):
            raise UsageError(
                f"{out}: {name}: found {theirs.get(name)!r}; allowed: {ours.get(name)!r}, as in "
                "the job"
            )


def chunk_rows(store: Store, plan: Plan, chunk: Chunk, encoder: PromptEncoder) -> list[Row]:
    """All rows of a committed chunk, of each the first sample; rows in error are left out.

    Args:
        store: output folder.
        plan: its plan; its list of chunks is not used.
        chunk: ran at full depth.
        encoder: of the job.

    Raises:
        JobFailedError: the part or the input cannot be read.
    """
    num_patches = patch_counts(store)[chunk.chunk_id]
    picks = list(range(chunk.num_rows))
    return _rows_of_chunk(store, plan, chunk, encoder, picks, num_patches)


def _rows_of_chunk(
    store: Store,
    plan: Plan,
    chunk: Chunk,
    encoder: PromptEncoder,
    picks: Sequence[int],
    num_patches: int,
) -> list[Row]:
    source = read_chunk(plan, chunk, encoder.columns)
    ids = table_ids(source, plan, plan.files[chunk.file_index].path)
    said: dict[RowId, list[int]] = {}
    for patch in range(num_patches + 1):
        said |= _token_ids(store, layout.data_part(chunk.chunk_id, patch))
    rows = []
    for pick, row in zip(picks, iter_rows(source.take(picks)), strict=True):
        generated = said.get(ids[pick])
        if generated:
            rows.append(Row(encoder.encode(row), generated))
    return rows


def _token_ids(store: Store, rel: str) -> dict[RowId, list[int]]:
    """The first sample of each row of a part; none where all rows were in error."""
    if not store.exists(rel):
        return {}
    try:
        with store.open_input(rel) as stream:
            table = pq.read_table(stream, columns=["row_id", "sample_index", "token_ids"])
    except (OSError, pa.ArrowException) as error:
        raise JobFailedError(f"{store.text}: {rel}: cannot be read: {error}") from error
    return {
        row["row_id"]: row["token_ids"] for row in table.to_pylist() if row["sample_index"] == 0
    }
