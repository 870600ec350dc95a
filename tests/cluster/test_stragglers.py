"""Which chunk an idle replica does as well: the one that is late, if it would be faster."""

from __future__ import annotations

from eevp_batch.cluster.leases import Lease
from eevp_batch.cluster.stragglers import (
    MARGIN,
    Holding,
    Pace,
    expected,
    usual_speed,
    worth_copying,
)

ROWS = 100


def pace(rows_per_s: float, busy_s: float = 50.0, quiet_since_s: float = 50.0) -> Pace:
    """Of a replica that has worked for so long at so many rows a second; the clock shows 50."""
    found = Pace()
    found.heard(0, True, 50.0 - busy_s)
    found.heard(int(rows_per_s * busy_s), True, quiet_since_s)
    found.heard(int(rows_per_s * busy_s), True, 50.0)
    return found


def holding(speed: float, *chunk_ids: int, open_rows: int = 0, quiet_s: float = 0.0) -> Holding:
    leases = [(Lease(chunk_id, chunk_id + 1, 1, "r"), ROWS) for chunk_id in chunk_ids]
    return Holding(pace(speed, quiet_since_s=50.0 - quiet_s), leases, open_rows)


def chosen(*holdings: Holding, speed: float = 10.0) -> int | None:
    found = worth_copying(expected(holdings, speed, 50.0), speed)
    return None if found is None else found.lease.chunk_id


def test_a_pace_is_rows_by_busy_seconds() -> None:
    found = Pace()
    assert found.rows_per_s is None and found.quiet_s(9.0) == 0.0
    found.heard(0, False, 0.0)
    found.heard(0, False, 10.0)
    found.heard(30, True, 13.0)
    found.heard(30, True, 15.0)
    assert found.rows_per_s == 6.0, "the ten seconds without work do not count"
    assert found.quiet_s(17.0) == 4.0
    found.heard(10, True, 18.0)  # a chunk was called off: its rows were finished all the same
    assert found.rows == 30 and found.quiet_s(18.0) == 5.0
    found.heard(10, False, 30.0)
    assert found.quiet_s(31.0) == 1.0, "who holds nothing is not quiet"
    found.heard(16, False, 32.0)
    assert (found.rows, found.busy_s) == (36, 10.0), "it was busy, and is not any more"


def test_the_usual_speed_is_that_of_those_who_have_one() -> None:
    assert usual_speed([Pace(), Pace()]) is None
    assert usual_speed([Pace(), pace(4.0), pace(6.0), pace(100.0)]) == 6.0


def test_replicas_of_one_speed_copy_nothing() -> None:
    for open_rows in range(0, ROWS, 10):
        assert chosen(holding(10.0, 0, open_rows=open_rows)) is None


def test_the_chunk_of_a_slow_replica_is_copied_while_that_wins_time() -> None:
    speed = 10.0 / 3  # 30 s a chunk; elsewhere 10 s
    for open_rows in range(ROWS):
        left_s = (ROWS - open_rows) / speed
        expected_id = 0 if left_s > MARGIN * 10.0 else None
        assert chosen(holding(speed, 0, open_rows=open_rows)) == expected_id


def test_of_several_chunks_the_last_one_goes_first() -> None:
    waiting = holding(10.0, 0, 1, 2)
    assert chosen(waiting) == 2, "it would be begun only when the others are done"
    assert chosen(holding(10.0, 0), holding(2.0, 1), waiting) == 1, "the slowest is later still"
    ids = [s.lease.chunk_id for s in expected([waiting, holding(2.0, 3)], 10.0, 50.0)]
    assert ids == [3, 2, 1, 0]


def test_a_replica_that_is_quiet_for_long_is_expected_to_stay_so() -> None:
    assert chosen(holding(10.0, 0, open_rows=ROWS - 1, quiet_s=5.0)) is None, "its last row is long"
    assert chosen(holding(10.0, 0, open_rows=ROWS - 1, quiet_s=20.0)) == 0, "it hangs"


def test_of_a_replica_without_a_row_the_usual_speed_is_expected() -> None:
    fresh = Holding(Pace(), [(Lease(0, 1, 1, "r"), ROWS)], 0)
    assert chosen(fresh) is None
    stuck = Pace()
    stuck.heard(0, True, 0.0)
    assert chosen(Holding(stuck, [(Lease(0, 1, 1, "r"), ROWS)], 0)) == 0
