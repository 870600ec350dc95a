"""The real coordinator on the benchmark's virtual clock: many replicas, and many of them die."""

from __future__ import annotations

import argparse

import pytest

from eevp_batch.cluster.learning import learning_chunks
from eevp_batch.spec import ExitSpec
from eevp_batch.storage import layout
from eevp_batch.storage.status import read_events
from tests.bench.simulation import ROWS, Simulation


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


@pytest.mark.parametrize("learn_chunks", [40, 45, 50, 55])
def test_exits_are_learned_once_the_last_row_for_them_is_there(learn_chunks: int) -> None:
    """However many replicas finish something meanwhile, and are given more."""
    chosen = argparse.Namespace(replicas=20, chunk_s=5.0, life_h=0.0, storage="instant")
    simulation = Simulation(chosen, 200)
    learns = ExitSpec.model_validate({"mode": "learn", "learn_rows": ROWS * learn_chunks})
    simulation.spec = simulation.spec.model_copy(update={"exit": learns})
    needed = set(learning_chunks(simulation.spec, simulation.plan))
    simulation.run()
    told = list(read_events(simulation.store))
    started = next(n for n, event in enumerate(told) if event["event"] == "learning_started")
    committed = [e["chunk_id"] for e in told[:started] if e["event"] == "chunk_committed"]
    assert needed <= set(committed)
    last = max(committed.index(chunk_id) for chunk_id in needed)
    assert len(committed) - last <= 2, "nothing but what came with it was taken before"
    assert any(event["event"] == "learning_failed" for event in told)


def test_requests_to_a_bucket_do_not_grow_with_the_job() -> None:
    each = []
    for chunks in (200, 800):
        chosen = argparse.Namespace(replicas=20, chunk_s=2.0, life_h=0.0, storage="instant")
        found = Simulation(chosen, chunks).run()
        each.append(sum(found["requests_per_chunk"].values()))
    assert each[1] <= each[0] + 0.05
