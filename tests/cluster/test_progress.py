"""Live counters of replicas that come and go add up to one steady picture."""

from __future__ import annotations

from collections import Counter

import pytest

from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.progress import Meter
from eevp_batch.cluster.resources import replica_resources
from eevp_batch.errors import UsageError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import ClusterSpec


def seen(**layers: int) -> LoopProgress:
    histogram = Counter({int(name[1:]): count for name, count in layers.items()})
    return LoopProgress(tokens=histogram.total(), exit_histogram=histogram)


def test_tokens_add_up_over_replicas_and_their_successors() -> None:
    meter = Meter(ChunkStats(exit_histogram=Counter({6: 100})), 0.0, 150, 50)
    meter.update(0, "eevp-replica-0", seen(l2=10))
    meter.update(1, "eevp-replica-1", seen(l2=5, l6=5))
    meter.update(0, "eevp-replica-0", seen(l2=30))
    assert meter.tokens == 140, "a replica's second report replaces its first"
    meter.update(0, "eevp-replica-0.2", seen(l4=7))
    assert meter.tokens == 147, "a successor starts at zero; what its predecessor made was made"
    assert meter.mean_exit_layer == pytest.approx((2 * 35 + 4 * 7 + 6 * 105) / 147)


def test_rates_leave_the_start_out() -> None:
    meter = Meter(ChunkStats(rows_ok=50), 0.0, 150, 50)
    assert meter.tokens_per_s(5.0) is None and meter.eta_s(50, 5.0) is None
    meter.replica_is_ready(10.0)
    meter.update(0, "eevp-replica-0", seen(l2=40))
    assert meter.tokens_per_s(12.0) == pytest.approx(20.0)
    assert meter.eta_s(70, 12.0) == pytest.approx(8.0), "20 of this run's rows took 2 s"
    assert meter.working_s(12.0) == 2.0


def test_rows_under_way_count_for_the_time_left() -> None:
    """192 rows, 64 at a time, 40 s each, in step but for the first, which is short."""
    meter = Meter(ChunkStats(), 0.0, 192, 0)
    meter.replica_is_ready(0.0)
    meter.update(0, "eevp-replica-0", LoopProgress(max_resident=64))
    early, half_way, late = meter.eta_s(1, 10.0), meter.eta_s(96, 60.0), meter.eta_s(190, 118.0)
    assert early is not None and 30 < early < 110, "not 191 times the 10 s of the first row"
    assert half_way == pytest.approx(30.0), "64 of the 96 others are half done"
    assert late is not None and 0 < late < 2


def test_a_row_of_several_samples_is_under_way_once() -> None:
    """64 sequences are 16 rows of 4 samples each."""
    meter = Meter(ChunkStats(), 0.0, 192, 0, samples=4)
    meter.replica_is_ready(0.0)
    meter.update(0, "eevp-replica-0", LoopProgress(max_resident=64))
    assert meter.eta_s(56, 64.0) == pytest.approx(128.0), "64 rows of work in 64 s, 128 left"


def test_the_window_forgets_what_is_long_ago() -> None:
    meter = Meter(ChunkStats(), 0.0, 150, 0)
    meter.replica_is_ready(0.0)
    for second in range(1, 1_001):
        tokens = 10 * min(second, 500) + 30 * max(0, second - 500)
        meter.update(0, "eevp-replica-0", seen(l2=tokens))
        rate = meter.tokens_per_s(float(second))
    assert rate == pytest.approx(30.0), "the rate of long ago still shows"
    assert len(vars(meter)["_window"]) < 30, "the window grows with the job"


def test_the_last_rate_does_not_change_when_what_died_with_its_replica_is_taken_off() -> None:
    meter = Meter(ChunkStats(), 0.0, 150, 0)
    meter.replica_is_ready(0.0)
    meter.update(0, "eevp-replica-0", seen(l2=2_000))
    meter.tokens_per_s(2.0)
    meter.update(0, "eevp-replica-0.2", seen(l2=100))
    assert meter.tokens_per_s(3.0) == pytest.approx(700.0)
    meter.settle(ChunkStats(exit_histogram=Counter({2: 150})))
    assert meter.tokens == 150
    assert meter.tokens_per_s(4.0) == pytest.approx(2_100 / 4)


def test_what_the_live_counters_had_not_heard_of_is_in_the_last_rate() -> None:
    meter = Meter(ChunkStats(), 0.0, 150, 0)
    meter.replica_is_ready(0.0)
    assert meter.tokens_per_s(2.0) == 0.0
    meter.settle(ChunkStats(exit_histogram=Counter({2: 40})))
    assert meter.tokens_per_s(4.0) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("settings", "nodes", "cpus", "gpus"),
    [
        ({"replicas": 2}, {"CPU": 5.0}, 2.0, 0.0),
        ({"replicas": 4}, {"CPU": 4.0, "GPU": 4.0}, 1.0, 1.0),
        ({"replicas": 2}, {"CPU": 4.0, "GPU": 1.0}, 2.0, 0.5),
        ({"replicas": 1}, {"CPU": 8.0, "GPU": 8.0}, 8.0, 1.0),
        ({"replicas": 1, "gpus_per_replica": 2}, {"CPU": 8.0, "GPU": 2.0}, 8.0, 2.0),
        ({"replicas": 2, "cpus_per_replica": 0.5}, {"CPU": 1.0}, 0.5, 0.0),
        ({"replicas": 3}, {"CPU": 8.0, "GPU": 2.0}, 2.0, 0.5),
        ({"replicas": 1}, [{"CPU": 4.0}, {"CPU": 2.0}, {}], 4.0, 0.0),
        ({"replicas": 3}, [{"CPU": 4.0}, {"CPU": 3.0}, {}], 2.0, 0.0),
        ({"replicas": 9, "address": "auto"}, [{"CPU": 4.0}, {"CPU": 2.0}], 1.0, 0.0),
        ({"replicas": 2, "gpus_per_replica": 8, "address": "auto"}, [{"CPU": 4.0}], 2.0, 8.0),
    ],
)
def test_auto_shares_out_what_there_is(
    settings: dict[str, float],
    nodes: dict[str, float] | list[dict[str, float]],
    cpus: float,
    gpus: float,
) -> None:
    """A replica stands on one node, whatever all of them have together."""
    offered = nodes if isinstance(nodes, list) else [nodes]
    resources = replica_resources(ClusterSpec.model_validate(settings), offered)
    assert (resources.num_cpus, resources.num_gpus) == (cpus, gpus)
    assert resources.num_threads == max(1, int(cpus))


def test_asking_for_more_than_there_is_fails_before_anything_waits_for_it() -> None:
    for settings in ({"gpus_per_replica": 1}, {"cpus_per_replica": 9}):
        spec = ClusterSpec.model_validate({"replicas": 2, **settings})
        with pytest.raises(UsageError, match="per_replica"):
            replica_resources(spec, [{"CPU": 16.0, "GPU": 1.0}])
