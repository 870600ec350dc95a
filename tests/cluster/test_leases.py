"""Every chunk is in one state, is committed exactly once, and only under its current lease."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from eevp_batch.cluster.leases import SUSPECT_AFTER, Lease, LeaseTable
from eevp_batch.errors import StaleAttemptError
from eevp_batch.records import Phase

REPLICAS = ["a", "b", "c"]
PHASES: list[Phase] = ["full", "exits"]


class LeaseWalk(RuleBasedStateMachine):
    """Replicas lease, copy, finish, give back, die and come back as zombies, in any order."""

    @initialize(num_chunks=st.integers(0, 12))
    def start(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.table = LeaseTable(iter(range(num_chunks)), num_chunks)
        self.live: list[Lease] = []
        self.stale: list[Lease] = []
        self.committed: list[int] = []
        self.deaths = dict.fromkeys(range(num_chunks), 0)
        self.last_epoch = 0
        self.phases: dict[int, Phase] = {}

    @rule(replica=st.sampled_from(REPLICAS), phase=st.sampled_from(PHASES))
    def lease(self, replica: str, phase: Phase) -> None:
        leased = {lease.chunk_id for lease in self.live}
        pending = set(range(self.num_chunks)) - leased - set(self.committed)
        lease = self.table.lease(replica, phase)
        suspects = {chunk_id for chunk_id in pending if self.deaths[chunk_id] >= SUSPECT_AFTER}
        held = [other for other in self.live if other.replica == replica]
        if lease is None:
            is_kept = any(other.is_alone for other in held) or (suspects and held)
            assert is_kept or not pending, f"chunks {pending} are pending, but none was leased"
            return
        assert not any(other.is_alone for other in held), f"{lease} joins a suspect"
        assert lease.is_alone == (lease.chunk_id in suspects)
        assert not (lease.is_alone and held), f"{lease} is of a suspect, and not alone"
        assert lease.is_alone or held or not suspects, f"{lease} goes before suspects {suspects}"
        assert lease.phase == self.phases.get(lease.chunk_id, phase), f"{lease}: another phase"
        assert lease.chunk_id in pending, f"{lease} is of a chunk that was not pending"
        assert lease.epoch > self.last_epoch, f"{lease} has an epoch that is not new"
        assert lease.attempt_no == 1 + self.deaths[lease.chunk_id], f"{lease} is miscounted"
        assert lease.replica == replica and not lease.is_copy
        self.last_epoch = lease.epoch
        self.live.append(lease)

    @precondition(lambda self: self.live)
    @rule(replica=st.sampled_from(REPLICAS), data=st.data())
    def copy(self, replica: str, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.live))
        of_chunk = [other for other in self.live if other.chunk_id == lease.chunk_id]
        may_be = len(of_chunk) == 1 and self.deaths[lease.chunk_id] < SUSPECT_AFTER
        assert self.table.can_copy(lease) == may_be, f"{lease} beside {of_chunk}"
        if not may_be or any(other.replica == replica for other in self.live):
            return
        copy = self.table.copy(lease, replica)
        assert (copy.chunk_id, copy.phase) == (lease.chunk_id, lease.phase)
        assert copy.is_copy and not copy.is_alone and copy.epoch > self.last_epoch
        assert copy.attempt_no == 2 + self.deaths[lease.chunk_id], f"{copy} is miscounted"
        assert self.table.rivals(lease) == [copy] and self.table.rivals(copy) == [lease]
        self.last_epoch = copy.epoch
        self.live.append(copy)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.live))
        assert self.table.give_back(lease) and not self.table.give_back(lease)
        self.live.remove(lease)
        self.stale.append(lease)

    @precondition(lambda self: any(lease.is_alone for lease in self.live))
    @rule(data=st.data())
    def piece(self, data: st.DataObject) -> None:
        alone = [lease for lease in self.live if lease.is_alone]
        lease = data.draw(st.sampled_from(alone))
        self.table.put_back(lease)
        self.phases[lease.chunk_id] = lease.phase
        self.live.remove(lease)
        self.stale.append(lease)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.live))
        self.table.commit(lease)
        ended = [other for other in self.live if other.chunk_id == lease.chunk_id]
        self.live = [other for other in self.live if other not in ended]
        self.committed.append(lease.chunk_id)
        self.stale += ended

    @rule(replica=st.sampled_from(REPLICAS))
    def die(self, replica: str) -> None:
        returned = self.table.release(replica)
        expected = [lease for lease in self.live if lease.replica == replica]
        assert returned == expected, "a death gives back what the dead replica held, and only that"
        for lease in returned:
            self.live.remove(lease)
            self.deaths[lease.chunk_id] += 1
            self.stale.append(lease)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def zombie_reports(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        assert not self.table.is_current(lease) and not self.table.give_back(lease)
        with pytest.raises(StaleAttemptError):
            self.table.commit(lease)

    @invariant()
    def accounts_for_every_chunk(self) -> None:
        table = self.table
        assert len(set(self.committed)) == len(self.committed), "a chunk was committed twice"
        assert table.num_committed == len(self.committed)
        by_chunk: dict[int, list[Lease]] = {}
        for lease in self.live:
            by_chunk.setdefault(lease.chunk_id, []).append(lease)
            assert table.is_current(lease)
        assert all(len(leases) <= 2 for leases in by_chunk.values()), "more than two at a chunk"
        assert table.num_leased == len(by_chunk)
        assert table.num_pending == self.num_chunks - len(by_chunk) - len(self.committed)
        assert table.num_unfinished == table.num_pending + table.num_leased
        for chunk_id in range(self.num_chunks):
            leases = by_chunk.get(chunk_id)
            assert table.current_epoch(chunk_id) == (leases[0].epoch if leases else None)
        assert [table.num_held(r) for r in REPLICAS] == [len(table.leases_of(r)) for r in REPLICAS]
        held = [lease for replica in REPLICAS for lease in table.leases_of(replica)]
        assert sorted(lease.epoch for lease in held) == [lease.epoch for lease in self.live]

    def teardown(self) -> None:
        """Whatever happened, the rest can be finished, each chunk once."""
        if not hasattr(self, "table"):
            return
        for replica in REPLICAS:
            self.die(replica)
        while (lease := self.table.lease("z")) is not None:
            self.table.commit(lease)
            self.committed.append(lease.chunk_id)
        assert sorted(self.committed) == list(range(self.num_chunks)), "a chunk was lost"


def test_every_walk_commits_each_chunk_once() -> None:
    run_state_machine_as_test(
        LeaseWalk, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


def test_a_table_holds_nothing_of_committed_chunks() -> None:
    """Its size follows what is leased: thousands of chunks later it is what it was."""
    table = LeaseTable(iter(range(5_000)), 5_000)
    for _ in range(5_000):
        lease = table.lease("a")
        assert lease is not None
        table.commit(lease)
    sizes = {name: len(value) for name, value in vars(table).items() if hasattr(value, "__len__")}
    assert sum(sizes.values()) == sizes["_held"] == 1, f"committed chunks left something: {sizes}"
    assert table.leases_of("a") == []


def test_returned_chunks_go_first() -> None:
    table = LeaseTable(iter(range(3)), 3)
    first = table.lease("a")
    table.release("a")
    again = table.lease("b")
    assert again is not None and not again.is_alone, "one death makes no suspect"
    assert first is not None and again is not None
    assert again.chunk_id == first.chunk_id, "a chunk that was given back is not put off"
    assert again.attempt_no == 2


def test_no_more_replicas_get_empty_than_there_are_suspects() -> None:
    table = LeaseTable(iter(range(9)), 9)
    table.lease("a")
    for _ in range(SUSPECT_AFTER - 1):
        table.release("a")
        table.lease("a")
    for replica in "bc":
        assert table.lease(replica) is not None
    table.release("a")
    assert table.lease("b") is None, "the first that asks gets empty for the suspect"
    assert table.lease("c") is not None, "the others go on"
    table.commit(table.leases_of("b")[0])
    alone = table.lease("b")
    assert alone is not None and alone.is_alone and alone.chunk_id == 0
    assert table.lease("b") is None, "a replica that tries a suspect got a second chunk"
    assert table.lease("c") is not None
