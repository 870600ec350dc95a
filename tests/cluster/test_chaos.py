"""The short form of `python -m tests.nightly.chaos`: a replica, a raylet, the driver twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nightly import chaos


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_survives_deaths_of_every_kind(tmp_path: Path) -> None:
    found = chaos.run(tmp_path, num_rows=160, num_replicas=1, num_raylets=1, seed=0)
    assert found["killed"] == {"replicas": 1, "raylets": 1, "drivers": 2}
