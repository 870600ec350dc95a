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

from eevp_batch.cluster.leases import Lease, LeaseTable
from eevp_batch.errors import StaleAttemptError

REPLICAS = ["a", "b", "c"]


class LeaseWalk(RuleBasedStateMachine):
    """Replicas lease, finish, die, and come back as zombies, in any order."""

    @initialize(num_chunks=st.integers(0, 12))
    def start(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.table = LeaseTable(iter(range(num_chunks)), num_chunks)
        self.live: dict[int, Lease] = {}
        self.stale: list[Lease] = []
        self.committed: list[int] = []
        self.deaths = dict.fromkeys(range(num_chunks), 0)
        self.last_epoch = 0

    @rule(replica=st.sampled_from(REPLICAS))
    def lease(self, replica: str) -> None:
        pending = set(range(self.num_chunks)) - set(self.live) - set(self.committed)
        lease = self.table.lease(replica)
        if lease is None:
            assert not pending, f"chunks {pending} are pending, but none was leased"
            return
        assert lease.chunk_id in pending, f"{lease} is of a chunk that was not pending"
        assert lease.epoch > self.last_epoch, f"{lease} has an epoch that is not new"
        assert lease.attempt_no == 1 + self.deaths[lease.chunk_id], f"{lease} is miscounted"
        assert lease.replica == replica
        self.last_epoch = lease.epoch
        self.live[lease.chunk_id] = lease

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.live.values())))
        self.table.commit(lease)
        del self.live[lease.chunk_id]
        self.committed.append(lease.chunk_id)
        self.stale.append(lease)

    @rule(replica=st.sampled_from(REPLICAS))
    def die(self, replica: str) -> None:
        returned = self.table.release(replica)
        expected = [lease for lease in self.live.values() if lease.replica == replica]
        assert returned == expected, "a death gives back what the dead replica held, and only that"
        for lease in returned:
            del self.live[lease.chunk_id]
            self.deaths[lease.chunk_id] += 1
            self.stale.append(lease)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def zombie_reports(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        with pytest.raises(StaleAttemptError):
            self.table.commit(lease)

    @invariant()
    def accounts_for_every_chunk(self) -> None:
        table = self.table
        assert len(set(self.committed)) == len(self.committed), "a chunk was committed twice"
        assert table.num_committed == len(self.committed)
        assert table.num_leased == len(self.live)
        assert table.num_pending == self.num_chunks - len(self.live) - len(self.committed)
        assert table.num_unfinished == table.num_pending + table.num_leased
        for chunk_id in range(self.num_chunks):
            lease = self.live.get(chunk_id)
            assert table.current_epoch(chunk_id) == (lease.epoch if lease else None)
        held = [lease for replica in REPLICAS for lease in table.leases_of(replica)]
        assert sorted(lease.epoch for lease in held) == sorted(
            lease.epoch for lease in self.live.values()
        )

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
    assert sizes == {"_returned": 0, "_leased": 0, "_held": 1, "_deaths": 0}, (
        f"committed chunks left something behind: {sizes}"
    )
    assert table.leases_of("a") == []


def test_returned_chunks_go_first() -> None:
    table = LeaseTable(iter(range(3)), 3)
    first = table.lease("a")
    table.release("a")
    again = table.lease("b")
    assert first is not None and again is not None
    assert again.chunk_id == first.chunk_id, "a chunk that was given back is not put off"
    assert again.attempt_no == 2
