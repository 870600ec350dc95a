"""Walks of the depth queues: one queue each, first in first out, nobody starves."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.engine.depth_queues import DepthQueues


def queues(num_depths: int = 3, max_batch: int = 4, **settings: int) -> DepthQueues[int]:
    return DepthQueues(
        num_depths,
        max_batch,
        full_batch=settings.get("full_batch", max_batch),
        max_tokens=settings.get("max_tokens", 1000),
        age_cap=settings.get("age_cap", 8),
    )


def one_token(depth: int, sequence: int) -> int:
    return 1


def test_nobody_waits_then_nothing_runs() -> None:
    assert queues().pop(one_token) is None


def test_deepest_full_queue_runs_first() -> None:
    q = queues()
    for i in range(4):
        q.push(0, i)
    for i in range(4, 8):
        q.push(2, i)
    assert q.pop(one_token) == (2, [4, 5, 6, 7]), "the deep queue holds a full batch"


def test_a_full_batch_may_be_smaller_than_the_largest() -> None:
    q = queues(full_batch=2)
    for i in range(4):
        q.push(0, i)
    q.push(2, 4)
    q.push(2, 5)
    assert q.pop(one_token) == (2, [4, 5]), "two are enough down there"
    assert q.pop(one_token) == (0, [0, 1, 2, 3]), "and a batch still takes all that it can"


def test_a_sequence_can_be_taken_out() -> None:
    q = queues()
    for i in range(3):
        q.push(1, i)
    q.remove(1)
    assert q.pop(one_token) == (1, [0, 2])


def test_without_a_full_queue_the_fullest_runs() -> None:
    q = queues()
    q.push(2, 0)
    for i in range(1, 4):
        q.push(0, i)
    assert q.pop(one_token) == (0, [1, 2, 3])


def test_a_batch_stops_before_the_token_limit() -> None:
    q = queues(max_tokens=10)
    costs = {0: 6, 1: 4, 2: 1}
    for i in costs:
        q.push(0, i)
    batch = q.pop(lambda depth, i: costs[i])
    assert batch == (0, [0, 1]), "6 + 4 tokens fit 10, one more does not"


def test_a_sequence_over_the_token_limit_runs_alone() -> None:
    q = queues(max_tokens=10)
    q.push(0, 0)
    q.push(0, 1)
    assert q.pop(lambda depth, i: 50) == (0, [0])


def test_a_deep_sequence_runs_although_the_shallow_queue_stays_full() -> None:
    """Every shallow token leaves early, so queue 0 always holds a full batch."""
    q = queues(num_depths=2, age_cap=8)
    q.push(1, 99)
    for i in range(8):
        q.push(0, i)
    for step in range(20):
        batch = q.pop(one_token)
        assert batch is not None
        if 99 in batch.sequences:
            assert step >= 8, "before the cap a full batch is worth more"
            return
        for i in batch.sequences:
            q.push(0, i)
    raise AssertionError("the deep sequence never ran")


walks = st.tuples(
    st.integers(1, 4),  # depths
    st.integers(1, 5),  # batch
    st.integers(1, 5),  # full batch
    st.integers(1, 30),  # residents
    st.integers(0, 12),  # age cap
    st.integers(1, 20),  # token limit
    st.randoms(use_true_random=False),
)


@given(walks)
def test_walk_keeps_one_queue_each_in_order_and_nobody_starves(walk) -> None:  # type: ignore[no-untyped-def]
    num_depths, max_batch, full_batch, residents, age_cap, max_tokens, random = walk
    q: DepthQueues[int] = DepthQueues(num_depths, max_batch, full_batch, max_tokens, age_cap)
    shadow: list[deque[int]] = [deque() for _ in range(num_depths)]
    pushed_at = dict.fromkeys(range(residents), 0)
    for i in range(residents):
        q.push(0, i)
        shadow[0].append(i)
    bound = age_cap + residents
    for step in range(1, 200):
        batch = q.pop(lambda depth, i: 1 + i % 3)
        assert batch is not None, "sequences wait, so something must run"
        depth, sequences = batch
        assert 1 <= len(sequences) <= max_batch
        cost = sum(1 + i % 3 for i in sequences)
        assert cost <= max_tokens or len(sequences) == 1, "only a lone sequence may exceed it"
        for i in sequences:
            assert shadow[depth].popleft() == i, "each queue is first in, first out"
            assert step - pushed_at[i] <= bound, f"{i} waited longer than {bound} steps"
        for i in sequences:
            goes_deeper = depth + 1 < num_depths and random.random() < 0.5
            target = depth + 1 if goes_deeper else 0
            q.push(target, i)
            shadow[target].append(i)
            pushed_at[i] = step
        assert q.lengths == [len(queue) for queue in shadow], "each sequence stands in one queue"
        assert len(q) == residents, "no sequence is lost or doubled"
