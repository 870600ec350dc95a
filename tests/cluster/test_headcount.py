"""How many replicas are asked for, who leaves when, and what is said while there is no room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from eevp_batch.cluster.fleet import Resources, Slot
from eevp_batch.cluster.headcount import IDLE_S, Headcount
from eevp_batch.cluster.leases import LeaseTable
from eevp_batch.cluster.placement_watch import FIRST_TOLD_S, PlacementWatch
from eevp_batch.cluster.resources import cpus_to_offer, fleet_size, replica_resources
from eevp_batch.errors import JobFailedError, UsageError
from eevp_batch.spec import ClusterSpec

READY: Any = object()


class Staff:
    """A headcount of so many slots over so many chunks."""

    def __init__(self, num_slots: int, num_chunks: int) -> None:
        self.slots = [Slot(index) for index in range(num_slots)]
        self.table = LeaseTable(iter(range(num_chunks)), num_chunks)
        self.headcount = Headcount(self.slots, self.table)

    def fill(self, now_s: float = 0.0, *, comes_up: bool = True) -> list[int]:
        """Start whoever is to start; their numbers."""
        found = list(self.headcount.to_start(now_s))
        for slot in found:
            slot.place = object()
            if comes_up:
                slot.handle, slot.ready = object(), READY
        return [slot.index for slot in found]

    def leaving(self, now_s: float) -> list[int]:
        return [slot.index for slot in self.headcount.to_leave(now_s)]


def test_no_more_replicas_start_than_there_are_chunks() -> None:
    staff = Staff(10, 4)
    assert staff.fill() == [0, 1, 2, 3] and staff.fill() == []
    assert staff.table.lease(staff.slots[0].name) is not None
    assert staff.fill() == [], "a chunk that is leased asks for nobody"
    assert Staff(2, 9).fill() == [0, 1]


def test_a_slot_that_has_to_wait_for_its_next_start_keeps_nobody_else_waiting() -> None:
    staff = Staff(3, 2)
    staff.slots[0].not_before_s = 5.0
    assert staff.fill(0.0) == [1, 2]
    assert staff.fill(6.0) == [], "both chunks have somebody"


def test_who_has_nothing_left_to_do_leaves_and_one_stays() -> None:
    staff = Staff(4, 5)
    staff.fill()
    leases = [staff.table.lease(slot.name) for slot in staff.slots]
    assert staff.leaving(0.0) == [] and staff.table.num_pending == 1
    last = staff.table.lease(staff.slots[3].name)
    for lease in leases:
        assert lease is not None
        staff.table.commit(lease)
    assert staff.leaving(10.0) == [], "nobody leaves at once"
    assert staff.leaving(10.0 + IDLE_S) == [1, 2], "the fourth works, the first stands by"
    assert last is not None
    staff.table.release(last.replica)
    assert staff.leaving(11.0 + IDLE_S) == [], "a chunk has come back"
    assert staff.table.lease(staff.slots[3].name) is not None
    assert staff.leaving(12.0 + IDLE_S) == [], "the time begins anew"


def test_a_place_that_nobody_needs_any_more_is_not_waited_for() -> None:
    staff = Staff(3, 3)
    staff.fill(comes_up=False)
    staff.slots[0].handle, staff.slots[0].ready = object(), READY
    while (lease := staff.table.lease(staff.slots[0].name)) is not None:
        held = lease
    assert staff.leaving(0.0) == [1, 2]
    assert held.chunk_id == 2


class Waiting:
    """A placement watch whose messages are kept."""

    def __init__(self, needed: int, timeout_s: float = 100.0) -> None:
        self.said: list[str] = []
        self.watch = PlacementWatch(
            needed, timeout_s, Resources(2, 0.5), lambda: "1 CPUs and 0 GPUs", self.said.append
        )

    def look(self, placed: int, seconds: range, wanted: int = 9) -> list[bool]:
        return [self.watch.look(float(second), placed, wanted) for second in seconds]


def test_a_job_without_room_says_what_it_waits_for_and_gives_up() -> None:
    waiting = Waiting(needed=2)
    with pytest.raises(JobFailedError, match=r"cluster\.placement_timeout_s") as caught:
        waiting.look(1, range(200))
    assert "a place for 1 of the 2 replicas that the job needs, each 2 CPUs and 0.5 GPUs on" in str(
        caught.value
    )
    assert "free on its nodes: 1 CPUs and 0 GPUs" in str(caught.value)
    assert len(waiting.said) == 4, "after 10, 20, 40 and 80 seconds"
    assert "waiting up to 100 s" in waiting.said[0]


def test_a_job_that_has_begun_goes_on_with_one_replica() -> None:
    waiting = Waiting(needed=3)
    assert waiting.look(1, range(0, 50)) == [False] * 50
    assert waiting.look(3, range(50, 51)) == [True]
    assert waiting.look(1, range(51, 400)) == [True] * 349, "nodes leave, and it goes on"
    with pytest.raises(JobFailedError, match="0 of the 1"):
        waiting.look(0, range(400, 600))


def test_a_small_rest_needs_no_more_replicas_than_chunks() -> None:
    assert Waiting(needed=4).look(1, range(3), wanted=1) == [True] * 3
    assert Waiting(needed=4).look(0, range(3), wanted=0) == [True] * 3, "all of it is leased"


def test_a_pause_of_the_machine_is_no_waiting() -> None:
    waiting = Waiting(needed=1)
    assert waiting.look(0, range(0, 10_000, 1_000)) == [False] * 10
    assert len(waiting.said) == 3 and FIRST_TOLD_S == 10.0, "45 seconds count"


@pytest.mark.parametrize(
    ("settings", "nodes", "cpus", "gpus", "size"),
    [
        ({"replicas": {"max": 4}}, [{"CPU": 2.0}], 1.0, 0.0, 2),
        ({"replicas": {"max": 4}}, [{"CPU": 16.0}], 4.0, 0.0, 4),
        ({"replicas": {"max": 4}}, [{"CPU": 8.0, "GPU": 2.0}], 4.0, 1.0, 2),
        ({"replicas": {"min": 4, "max": 4}}, [{"CPU": 8.0, "GPU": 2.0}], 2.0, 0.5, 4),
        ({"replicas": {"max": 9}, "address": "auto"}, [{"CPU": 8.0, "GPU": 2.0}], 4.0, 1.0, 9),
        ({"replicas": {"max": 9}, "gpus_per_replica": 0.25}, [{"CPU": 8, "GPU": 1}], 2.0, 0.25, 4),
        ({"replicas": {"max": 9}, "gpus_per_replica": 2}, [{"CPU": 8, "GPU": 4}], 4.0, 2.0, 2),
        ({"replicas": 3}, [{"CPU": 3.0}], 1.0, 0.0, 3),
    ],
)
def test_a_range_takes_what_there_is(
    settings: Mapping[str, Any], nodes: list[dict[str, float]], cpus: float, gpus: float, size: int
) -> None:
    spec = ClusterSpec.model_validate(settings)
    resources = replica_resources(spec, nodes)
    assert (resources.num_cpus, resources.num_gpus) == (cpus, gpus)
    assert fleet_size(spec, nodes, resources) == size
    assert resources.bundle == {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def test_a_range_that_its_own_ray_cannot_begin_is_refused() -> None:
    spec = ClusterSpec.model_validate({"replicas": {"min": 3, "max": 9}, "gpus_per_replica": 1})
    with pytest.raises(UsageError, match="found 1 for each of 3 replicas; allowed: 2 in all"):
        replica_resources(spec, [{"CPU": 16.0, "GPU": 2.0}])
    offered = cpus_to_offer(ClusterSpec.model_validate({"replicas": {"min": 300, "max": 999}}))
    assert offered == 300, "on a laptop replicas share cores, as many as have to be there"
