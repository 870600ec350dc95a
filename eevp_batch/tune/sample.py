"""Prompts to fit to or measure on: some rows of Parquet files, spread over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.errors import InputError, RowError
from eevp_batch.storage.chunks import iter_rows
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.listing import list_inputs
from eevp_batch.storage.schema import listed

BLOCKS = 16
"""Places that rows are taken from: few enough to read quickly, enough to see a sorted input."""


def sample_prompts(
    paths: str | Sequence[str], encoder: PromptEncoder, num_rows: int
) -> list[list[int]]:
    """Token ids of about `num_rows` prompts; rows that cannot be encoded are left out.

    Args:
        paths: as `input.path` of a job.
        encoder: from a row to token ids.
        num_rows: 1 or more; all rows where there are fewer.

    Raises:
        InputError: no such file, no such column, or no row that can be encoded.
    """
    files = [InputParquet.open(path) for path in list_inputs(paths)]
    for file in files:
        missing = [name for name in encoder.columns if name not in file.schema.names]
        if missing:
            allowed = f"columns of the input: {listed(file.schema.names)}"
            raise InputError(file.text, "column", f"no column {missing[0]!r}", allowed)
    found = []
    for row in _rows(files, encoder.columns, num_rows):
        try:
            found.append(encoder.encode(row))
        except RowError:
            continue
    if not found:
        raise InputError(str(paths), "input", "no row with a prompt", "one row or more")
    return found


def _rows(
    files: Sequence[InputParquet], columns: list[str], num_rows: int
) -> Iterator[dict[str, Any]]:
    """Evenly spaced blocks of all rows, as if the files were one."""
    total = sum(file.num_rows for file in files)
    num_rows = min(num_rows, total)
    blocks = min(BLOCKS, num_rows)
    for block in range(blocks):
        first, stop = block * num_rows // blocks, (block + 1) * num_rows // blocks
        start = first * total // num_rows
        yield from _run(files, columns, start, start + stop - first)


def _run(
    files: Sequence[InputParquet], columns: list[str], start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Rows `start` to `stop` of all files."""
    before = 0
    for file in files:
        first, last = max(start - before, 0), min(stop - before, file.num_rows)
        if first < last:
            for batch in file.batches(columns, first, last, last - first):
                yield from iter_rows(pa.Table.from_batches([batch]))
        before += file.num_rows
