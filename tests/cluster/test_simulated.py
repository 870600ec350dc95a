"""The real coordinator on the benchmark's virtual clock: many replicas, and many of them die."""

from __future__ import annotations

import argparse

import pytest

from eevp_batch.storage import layout
from tests.bench.simulation import Simulation


@pytest.mark.parametrize("storage", ["instant", "bucket"])
def test_every_chunk_is_committed_once_however_many_replicas_are_taken_away(storage: str) -> None:
    chosen = argparse.Namespace(replicas=60, chunk_s=5.0, life_h=100 / 3600, storage=storage)
    simulation = Simulation(chosen, 600)
    found = simulation.run()
    assert found["replica_deaths"] > 10, "nothing was put right, so nothing is shown"
    assert len(list(simulation.store.names(layout.COMMITS_DIR))) == 600
    assert len(list(simulation.store.names(layout.DATA_DIR))) == 600
    after = simulation.afterwards()
    assert after["resume"]["requests"]["get"] >= 540, "nine tenths of the records are read again"


def test_requests_to_a_bucket_do_not_grow_with_the_job() -> None:
    each = []
    for chunks in (200, 800):
        chosen = argparse.Namespace(replicas=20, chunk_s=2.0, life_h=0.0, storage="instant")
        found = Simulation(chosen, chunks).run()
        each.append(sum(found["requests_per_chunk"].values()))
    assert each[1] <= each[0] + 0.05
