"""Puts a job's report and its dataset card into its output folder, or the report elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.parquet as pq

from eevp_batch.report.card import is_ours, render_card
from eevp_batch.report.figures import JobFigures
from eevp_batch.report.page import render_page
from eevp_batch.storage import layout
from eevp_batch.storage.store import Store


def write_report(store: Store, figures: JobFigures, to: str | None = None) -> list[str]:
    """Write `report.html` and `README.md`; a README.md of somebody else's is left alone.

    Args:
        store: output folder.
        figures: what `gather` gave for it.
        to: a local file to write the report to instead; then there is no card.

    Returns:
        The paths that were written.

    Raises:
        OSError: the storage refused.
    """
    # A message of another program may hold half a surrogate pair, which no encoding has.
    page = render_page(figures, time.time()).encode("utf-8", "replace")
    if to is not None:
        Path(to).write_bytes(page)
        return [to]
    written = {layout.REPORT: page}
    if not store.exists(layout.CARD) or is_ours(store.read(layout.CARD).decode("utf-8", "replace")):
        card = render_card(figures, _columns(store, figures))
        written[layout.CARD] = card.encode("utf-8", "replace")
    for rel, content in written.items():
        store.write(rel, content)
    return [f"{store.text.rstrip('/')}/{rel}" for rel in written]


def _columns(store: Store, figures: JobFigures) -> list[tuple[str, str]]:
    """Name and type of the data's columns, from its first part."""
    if not figures.chunks.parts:
        return []
    with store.open_input(min(figures.chunks.parts)) as source:
        schema = pq.read_schema(source)
    return [(field.name, str(field.type).replace("element: ", "")) for field in schema]
