"""One hostile output, and the pages made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eevp_batch.report.figures import JobFigures, gather
from eevp_batch.storage.store import Store
from tests.report.outputs import make_output, write_events


@pytest.fixture(scope="session")
def evil_store(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Store:
    """An output in which every text that can be is markup; nobody writes to it."""
    store = make_output(tmp_path_factory.mktemp("evil"), tiny_llama)
    write_events(store)
    return store


@pytest.fixture(scope="session")
def evil_figures(evil_store: Store) -> JobFigures:
    return gather(evil_store)
