"""The engine loop: every prompt of every chunk comes back once, and nothing is left behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest

from eevp_batch.cluster.chunk_work import ChunkResult, ChunkWork
from eevp_batch.cluster.engine_loop import EngineLoop
from eevp_batch.cluster.replica import encode_rows
from eevp_batch.errors import EmptyPromptError, EngineError, EngineStalledError, PromptTooLongError
from eevp_batch.records import Generation, Prompt, RowFailure
from tests.cluster.scripted import Script, ScriptedEncoder, ScriptedEngine, exits_of

TIMEOUT_S = 10.0


@contextmanager
def running(engine: ScriptedEngine) -> Iterator[EngineLoop]:
    loop = EngineLoop(lambda: (engine, ScriptedEncoder()))
    try:
        yield loop
    finally:
        loop.close()


def work(key: int, rows: range, n: int = 1) -> ChunkWork:
    prompts = [Prompt(row, [1, 2], sample, key) for row in rows for sample in range(n)]
    return ChunkWork(key, prompts, [])


def keys(result: ChunkResult) -> Counter[tuple[object, int]]:
    return Counter((g.row_id, g.sample_index) for g in result.generations)


def test_chunks_overlap_and_each_gets_its_own_rows() -> None:
    engine = ScriptedEngine(Script(max_resident=7))
    chunks = {key: range(10 * key, 10 * key + 10) for key in range(5)}
    with running(engine) as loop:
        futures = {key: loop.submit(work(key, rows, n=2)) for key, rows in chunks.items()}
        for key, rows in chunks.items():
            result = futures[key].result(TIMEOUT_S)
            expected = Counter((row, sample) for row in rows for sample in range(2))
            assert keys(result) == expected, f"chunk {key} got other rows than its own"
            assert not result.failures
    assert engine.is_idle and engine.most_resident == 7, "the engine was not kept full"


def test_the_engine_stays_full_across_the_end_of_a_chunk() -> None:
    """With a second chunk in line, the batch drains only at the very end."""
    engine = ScriptedEngine(Script(max_resident=4))
    sizes = []
    step = engine.step

    def watched() -> list[Generation | RowFailure]:
        sizes.append(len(engine.resident))
        return step()

    engine.step = watched  # type: ignore[method-assign]
    both = work(1, range(8)), work(2, range(8, 16))
    total = sum(len(exits_of(row, 0)) for row in range(16))
    with running(engine) as loop:
        futures = [loop.submit(chunk) for chunk in both]
        for future in futures:
            future.result(TIMEOUT_S)
    assert sum(sizes) == total, "a token was made twice or never"
    full = len([size for size in sizes if size == 4])
    assert sizes[:full] == [4] * full, f"the batch drained before the end: {sizes}"


def test_a_failed_sample_fails_its_row_and_drops_the_others() -> None:
    with running(ScriptedEngine(Script(max_resident=2, failing=frozenset({1})))) as loop:
        result = loop.submit(work(7, range(3), n=4)).result(TIMEOUT_S)
        again = loop.submit(work(8, range(3, 5))).result(TIMEOUT_S)
    assert keys(result) == Counter((row, sample) for row in (0, 2) for sample in range(4))
    assert [failure.row_id for failure in result.failures] == [1], "one row, one failure"
    assert len(again.generations) == 2, "the loop goes on after an error row"


def test_a_row_error_of_add_is_the_row_s() -> None:
    class Choosy(ScriptedEngine):
        def add(self, prompt: Prompt) -> None:
            if prompt.row_id == 0:
                raise PromptTooLongError("too long")
            super().add(prompt)

    with running(Choosy(Script())) as loop:
        only_bad = loop.submit(work(1, range(1))).result(TIMEOUT_S)
        mixed = loop.submit(work(2, range(2), n=3)).result(TIMEOUT_S)
    assert [f.error_class for f in only_bad.failures] == ["PromptTooLongError"]
    assert [f.row_id for f in mixed.failures] == [0]
    assert keys(mixed) == Counter((1, sample) for sample in range(3))


def test_a_chunk_without_prompts_is_finished_at_once() -> None:
    failure = RowFailure(3, "EmptyPromptError", "empty")
    with running(ScriptedEngine(Script())) as loop:
        result = loop.submit(ChunkWork(1, [], [failure])).result(TIMEOUT_S)
    assert result == ChunkResult([], [failure])


def test_an_error_of_the_engine_reaches_every_chunk_open_or_later() -> None:
    engine = ScriptedEngine(Script(max_resident=2, raising=frozenset({5})))
    with running(engine) as loop:
        loop.built.result(TIMEOUT_S)
        futures = [loop.submit(work(key, range(4 * key, 4 * key + 4))) for key in (1, 2)]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(TIMEOUT_S)
        with pytest.raises(ZeroDivisionError):
            loop.submit(work(3, range(1))).result(TIMEOUT_S)


def test_an_engine_that_cannot_be_built_says_so_to_all() -> None:
    script = Script(unbuildable="error")
    loop = EngineLoop(script.build)
    with pytest.raises(EngineError):
        loop.built.result(TIMEOUT_S)
    with pytest.raises(EngineError):
        loop.submit(work(1, range(1))).result(TIMEOUT_S)


def test_an_idle_engine_without_room_is_a_stall() -> None:
    with running(ScriptedEngine(Script(max_resident=0))) as loop, pytest.raises(EngineStalledError):
        loop.submit(work(1, range(1))).result(TIMEOUT_S)


def test_a_result_that_nobody_waits_for_is_an_error() -> None:
    class Doubling(ScriptedEngine):
        def step(self) -> list[Generation | RowFailure]:
            return super().step() * 2

    with running(Doubling(Script())) as loop, pytest.raises(EngineError):
        loop.submit(work(1, range(4))).result(TIMEOUT_S)


def test_counters_add_up_at_rest() -> None:
    with running(ScriptedEngine(Script(failing=frozenset({2})))) as loop:
        chunk = work(1, range(20))
        loop.submit(chunk).result(TIMEOUT_S)
        loop.submit(ChunkWork(2, [], [RowFailure(90, "E", "m")])).result(TIMEOUT_S)
    progress = loop.progress()
    assert progress.tokens == sum(len(exits_of(row, 0)) for row in range(20))
    assert progress.exit_histogram.total() == progress.tokens


def test_rows_are_encoded_once_for_all_samples() -> None:
    rows = [{"id": "a", "prompt": "xy"}, {"id": "b", "prompt": None}]
    prompts, failures = encode_rows(rows, {}, "id", ScriptedEncoder(), 3, 9)
    assert [(p.row_id, p.sample_index, p.tag) for p in prompts] == [("a", s, 9) for s in range(3)]
    assert all(p.token_ids == [120, 121] for p in prompts)
    assert [(f.row_id, f.error_class) for f in failures] == [("b", EmptyPromptError.__name__)]


def test_a_chunk_that_is_called_off_leaves_nothing_and_harms_nobody() -> None:
    engine = ScriptedEngine(Script(max_resident=3, step_s=0.01))
    with running(engine) as loop:
        loop.built.result(TIMEOUT_S)
        futures = {
            key: loop.submit(work(key, range(100 * key, 100 * key + 20))) for key in range(1, 4)
        }
        loop.call_off(2)
        loop.call_off(99)  # nobody has it
        for key in (1, 3):
            assert keys(futures[key].result(TIMEOUT_S)).keys() == {
                (row, 0) for row in range(100 * key, 100 * key + 20)
            }
        with pytest.raises(CancelledError):
            futures[2].result(TIMEOUT_S)
        loop.call_off(1)  # it is finished
        again = loop.submit(work(4, range(5))).result(TIMEOUT_S)
        assert len(again.generations) == 5, "the loop goes on"
    assert engine.is_idle and loop.progress().finished_rows == 45, "its finished rows do not count"


def test_a_chunk_that_fills_the_engine_can_be_called_off() -> None:
    engine = ScriptedEngine(Script(max_resident=8, step_s=0.05))
    with running(engine) as loop:
        future = loop.submit(work(1, range(8)))
        while not engine.resident:
            time.sleep(0.001)
        loop.call_off(1)
        with pytest.raises(CancelledError):
            future.result(TIMEOUT_S)
        assert engine.is_idle
        assert len(loop.submit(work(2, range(8, 12))).result(TIMEOUT_S).generations) == 4
