"""One local Ray, or one cluster, for a module of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eevp_batch.cluster.local_ray import LocalRay, local_ray
from tests.cluster.nodes import Nodes


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[LocalRay]:
    """A local Ray that the jobs of a module share; `run_job` leaves it running."""
    with local_ray(num_cpus=4, dashboard=False) as local:
        yield local


@pytest.fixture(scope="module")
def nodes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the jobs that a module sends to its cluster."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def nodes(nodes_folder: Path) -> Iterator[Nodes]:
    """A cluster of three raylets."""
    cluster = Nodes(nodes_folder)
    try:
        yield cluster
    finally:
        cluster.close()
