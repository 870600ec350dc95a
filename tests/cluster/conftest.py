"""One local Ray for a module of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eevp_batch.cluster.local_ray import LocalRay, local_ray


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[LocalRay]:
    """A local Ray that the jobs of a module share; `run_job` leaves it running."""
    with local_ray(num_cpus=4, dashboard=False) as local:
        yield local
