"""Setting damage aside: a chunk that `verify` finds damaged loses its record, so it is done again.

The records are kept, under names that nobody reads; the damaged parts are replaced when the chunk
is committed again. Whoever calls this holds the job's lock.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from eevp_batch.storage import layout
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify_parts


@dataclass(frozen=True, slots=True)
class SetAside:
    """A chunk that has to be done again.

    Attributes:
        problems: what is wrong with it, one sentence each.
        records: where its records are now.
    """

    chunk_id: int
    problems: list[str]
    records: list[str]

    @property
    def text(self) -> str:
        """One sentence for a person."""
        where = f"; its record is now {', '.join(self.records)}" if self.records else ""
        name = layout.chunk_name(self.chunk_id)
        return f"chunk {name} is set aside and done again: {'; '.join(self.problems)}{where}"


def set_damage_aside(store: Store, plan: Plan) -> Iterator[SetAside]:
    """Verify all parts and take the record of each damaged chunk away, one at a time.

    `_SUCCESS` goes first, so that an unfinished job is never called done. What belongs to no chunk
    stays as it is; `verify` goes on to name it.
    """
    damaged = verify_parts(store, plan).damaged
    if damaged:
        store.delete(layout.SUCCESS, missing_ok=True)
    records = _records_by_chunk(store, set(damaged))
    for chunk_id, problems in sorted(damaged.items()):
        moved = [_set_aside(store, name) for name in records.get(chunk_id, [])]
        yield SetAside(chunk_id, problems, moved)


def _records_by_chunk(store: Store, chunk_ids: set[int]) -> dict[int, list[str]]:
    """Names of all records of these chunks and of their patches, which are worth nothing alone."""
    found: dict[int, list[str]] = {}
    for name in store.names(layout.COMMITS_DIR):
        key = layout.record_key(name)
        if key is not None and key[0] in chunk_ids:
            found.setdefault(key[0], []).append(name)
    return found


def _set_aside(store: Store, name: str) -> str:
    aside = f"{layout.SET_ASIDE_DIR}/{uuid.uuid4().hex[:8]}.{name}"
    store.publish(f"{layout.COMMITS_DIR}/{name}", aside)
    store.settle(layout.COMMITS_DIR)
    return aside
