"""Error rows tried again, without a model: patches, and the loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from eevp_batch.records import Generation, RowFailure, RowId
from eevp_batch.spec import JobSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Committer, write_attempt
from eevp_batch.storage.patches import Patch, find_patches, read_failures
from eevp_batch.storage.plan import Plan, read_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import generation

Redo = Callable[[Sequence[RowId]], Sequence[Generation]]
"""The generations of some rows; a row that has none fails again."""


def redone_but(hopeless: Sequence[RowId], num_samples: int = 1) -> Redo:
    """Scripted generations, but for the hopeless rows."""
    return lambda rows: [
        generation(row, sample)
        for row in rows
        if row not in hopeless
        for sample in range(num_samples)
    ]


def patch_attempt(store: Store, plan: Plan, spec: JobSpec, patch: Patch, redo: Redo) -> Attempt:
    """What a replica makes of a patch."""
    chunk = plan.chunks[patch.chunk_id]
    source = read_chunk(plan, chunk, ["prompt"])
    before = {failure.row_id: failure for failure in read_failures(store, patch)}
    ids = table_ids(source, plan, "input")
    numbers = [number for number, row_id in enumerate(ids) if row_id in before]
    rows = [ids[number] for number in numbers]
    done = redo(rows)
    failed = [
        RowFailure(row, "HopelessError", "again", before[row].attempts + 1)
        for row in rows
        if row not in {result.row_id for result in done}
    ]
    part = source.take(pa.array(numbers, pa.int64()))
    return write_attempt(
        store, plan, spec, chunk, 1, 1, part, done, failed, "replica", 1.0, patch=patch.number
    )


def retry(store: Store, spec: JobSpec, redo: Redo) -> None:
    """What a coordinator does with all rows in error."""
    plan = read_plan(store)
    committer = Committer(store, plan)
    committer.clean_attempts()
    patches = list(find_patches(committer))
    committer.reopen()
    for patch in patches:
        committer.commit(patch_attempt(store, plan, spec, patch, redo), 1)
    committer.finish({})
