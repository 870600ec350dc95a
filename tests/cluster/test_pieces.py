"""A real replica, without Ray, makes chunks in pieces and patches; real commits, real input."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.replica import GivenUp, Replica
from eevp_batch.cluster.selection import select_rows
from eevp_batch.storage.chunks import read_chunk, table_ids
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.patches import find_patches
from tests.cluster.jobs import Job, make_job
from tests.cluster.scripted import Script, exits_of

MAX_ATTEMPTS = 3


@contextmanager
def replica_of(job: Job, script: Script) -> Iterator[Replica]:
    plan = replace(job.plan, chunks=[])
    replica = Replica("replica", script.build, job.spec, plan, job.store.text)
    try:
        yield replica
    finally:
        replica._loop.close()


def work_off(job: Job, backlog: Backlog, script: Script, killing: Sequence[int] = ()) -> int:
    """What coordinator and replica do, where a replica dies of certain rows; how many died."""
    committer, deaths = Committer(job.store, job.plan), 0
    with replica_of(job, script) as replica:
        while (found := backlog.lease("replica", "exits")) is not None:
            lease, task = found
            source = read_chunk(job.plan, task.chunk, [])
            ids = table_ids(source, job.plan, "input")
            if {ids[number] for number in select_rows(job.store, task, ids).run} & set(killing):
                deaths += 1
                backlog.release("replica", "signal 9\nand its last words")
                continue
            attempt = asyncio.run(replica.process(lease, task))
            if not backlog.take_piece(lease, attempt):
                committer.commit(attempt, lease.epoch)
                for piece in backlog.commit(lease):
                    committer.discard(piece)
    committer.finish({})
    return deaths


def run(job: Job, script: Script, killing: Sequence[int] = ()) -> int:
    ids = range(len(job.plan.chunks))
    return work_off(job, Backlog(job.plan, ids, len(ids), MAX_ATTEMPTS), script, killing)


def retry(job: Job, script: Script, killing: Sequence[int] = ()) -> int:
    committer = Committer(job.store, job.plan)
    committer.reopen()
    patches = {patch.chunk_id: patch for patch in find_patches(committer)}
    return work_off(job, Backlog.retry(job.plan, patches, MAX_ATTEMPTS), script, killing)


def assert_accounted(job: Job, in_error: set[int], n: int = 1) -> None:
    keys = [(row, s) for row in range(job.plan.num_rows) if row not in in_error for s in range(n)]
    assert [(row["row_id"], row["sample_index"]) for row in job.rows()] == keys
    for row in job.rows():
        exits = exits_of(row["row_id"], row["sample_index"])
        assert row["token_ids"] == [exit.token_id for exit in exits]
        assert row.get("prompt", f"prompt {row['row_id']}") == f"prompt {row['row_id']}"
    assert [row["row_id"] for row in job.errors()] == sorted(in_error)
    assert not job.problems()
    assert not list((job.out / "_eevp" / "attempts").iterdir())


def test_the_pieces_of_a_chunk_become_one_part_in_input_order(tmp_path: Path) -> None:
    job = make_job(tmp_path, 26, chunk_rows=13, n=2, keep=["prompt"])
    deaths = run(job, Script(failing=frozenset({3, 14})), killing=[5, 11])
    assert deaths > 8
    assert_accounted(job, {3, 5, 11, 14}, n=2)
    table = pq.read_table(job.out / "data" / "part-00000.parquet")
    assert table.column("row_id").to_pylist() == sorted(table.column("row_id").to_pylist())
    errors = {row["row_id"]: row for row in job.errors()}
    assert errors[5]["error_class"] == errors[11]["error_class"] == "ReplicaDiedError"
    assert errors[5]["message"].endswith("the last one: signal 9"), "only the reason is told"
    assert errors[5]["attempts"] == MAX_ATTEMPTS and errors[3]["attempts"] == 1


def test_a_chunk_of_nothing_but_killers_is_a_part_of_errors(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4, chunk_rows=2)
    run(job, Script(), killing=[2, 3])
    assert_accounted(job, {2, 3})
    assert not (job.out / "data" / "part-00001.parquet").exists()


def test_a_row_that_kills_when_it_is_retried_is_found_among_the_others(tmp_path: Path) -> None:
    prompts = [None if row == 0 else f"prompt {row}" for row in range(8)]
    job = make_job(tmp_path, prompts, chunk_rows=8)
    run(job, Script(failing=frozenset({1, 2, 5, 6})))
    retry(job, Script(failing=frozenset({6})), killing=[2])
    assert_accounted(job, {0, 2, 6})
    found = {row["row_id"]: (row["error_class"], row["attempts"]) for row in job.errors()}
    assert found == {
        0: ("EmptyPromptError", 2),
        2: ("ReplicaDiedError", 1 + MAX_ATTEMPTS),
        6: ("NonFiniteScoresError", 2),
    }
    retry(job, Script())
    assert_accounted(job, {0})


def test_retried_rows_have_the_columns_of_the_others(tmp_path: Path) -> None:
    job = make_job(tmp_path, 10, n=3, keep=["prompt"])
    run(job, Script(failing=frozenset({2, 7})))
    retry(job, Script())
    assert_accounted(job, set(), n=3)
    assert len(pq.read_table(job.out / "data").to_pylist()) == 30, "the folder reads as one table"


def test_a_lease_that_is_called_off_gives_no_attempt(tmp_path: Path) -> None:
    """Whether it is called off before its rows are read, while they run, or too late."""
    job = make_job(tmp_path, 40, chunk_rows=20)
    backlog = Backlog(job.plan, range(2), 2, MAX_ATTEMPTS)
    first, second = (backlog.lease("replica", "exits") for _ in range(2))
    assert first and second

    async def story(replica: Replica) -> list[object]:
        slow = [asyncio.create_task(replica.process(*found)) for found in (first, second)]
        await asyncio.sleep(0)
        await replica.call_off(first[0].epoch)
        found: list[object] = [await slow[0]]
        while not replica._loop.progress().tokens:
            await asyncio.sleep(0.01)
        await replica.call_off(second[0].epoch)
        found += [await slow[1], await replica.process(*first)]
        await replica.call_off(first[0].epoch)
        await replica.leave()
        return [*found, await replica.process(*second)]

    with replica_of(job, Script(step_s=0.1, max_resident=2)) as replica:
        *dropped, made, last = asyncio.run(story(replica))
        assert dropped == [GivenUp(is_leaving=False)] * 2
        assert isinstance(made, Attempt) and made.chunk_id == 0, "it may be leased again"
        assert last == GivenUp(is_leaving=True) and replica._loop.progress().finished_rows == 20
    assert len(list((job.out / "_eevp" / "attempts").iterdir())) == 1


def test_a_replica_that_leaves_gives_back_what_it_has_not_generated(tmp_path: Path) -> None:
    job = make_job(tmp_path, 40, chunk_rows=20)
    backlog = Backlog(job.plan, range(2), 2, MAX_ATTEMPTS)
    leases = [backlog.lease("replica", "exits") for _ in range(2)]

    async def story(replica: Replica) -> list[object]:
        running = [asyncio.create_task(replica.process(*found)) for found in leases if found]
        while not replica._loop.progress().tokens:
            await asyncio.sleep(0.01)
        await replica.leave()
        assert (await replica.progress()).is_leaving
        return list(await asyncio.gather(*running))

    with replica_of(job, Script(step_s=0.1, max_resident=2)) as replica:
        assert asyncio.run(story(replica)) == [GivenUp(is_leaving=True)] * 2
