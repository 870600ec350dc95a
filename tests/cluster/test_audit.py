"""Audits and phases around scripted engines: every row once, audits on the chosen rows only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from eevp_batch.cluster.audit import AuditedEngine, is_audited
from eevp_batch.cluster.chunk_work import ChunkResult, ChunkWork
from eevp_batch.cluster.engine_loop import EngineLoop, RowEngine
from eevp_batch.cluster.phased import PhasedEngine
from eevp_batch.errors import PromptTooLongError
from eevp_batch.records import Generation, Phase, Prompt, RowId, TokenExit
from tests.cluster.scripted import Script, ScriptedEncoder, ScriptedEngine, exits_of

TIMEOUT_S = 10.0


class WholeEngine(ScriptedEngine):
    """Differs from the other engine in the last token of some rows; queues what it has no room for.

    Args:
        script: as there.
        different: rows that come out otherwise.
    """

    def __init__(self, script: Script, different: frozenset[RowId] = frozenset()) -> None:
        super().__init__(script)
        self.different = different
        self.arrivals: list[Prompt] = []

    @property
    def is_idle(self) -> bool:
        return not self.resident and not self.arrivals

    def add(self, prompt: Prompt) -> None:
        self.arrivals.append(prompt)

    def step(self) -> list[object]:  # type: ignore[override]
        while self.arrivals and self.has_room:
            super().add(self.arrivals.pop())
        return list(super().step())

    def give_up(self, tag: int) -> int:
        kept = [prompt for prompt in self.arrivals if prompt.tag != tag]
        num_waiting, self.arrivals = len(self.arrivals) - len(kept), kept
        return num_waiting + super().give_up(tag)

    def _result(self, prompt: Prompt, exits: list[TokenExit]) -> object:  # type: ignore[override]
        if prompt.row_id in self.different:
            exits = [*exits[:-1], exits[-1]._replace(token_id=999)]
        return super()._result(prompt, exits)


def run(engine: RowEngine, chunks: Sequence[ChunkWork]) -> list[ChunkResult]:
    loop = EngineLoop(lambda: (engine, ScriptedEncoder()))
    try:
        futures = [loop.submit(chunk) for chunk in chunks]
        return [future.result(TIMEOUT_S) for future in futures]
    finally:
        loop.close()


def work(key: int, rows: range, n: int = 1, phase: Phase = "exits") -> ChunkWork:
    prompts = [Prompt(row, [1, 2], sample, key, phase) for row in rows for sample in range(n)]
    return ChunkWork(key, prompts, [])


def test_the_share_of_audited_rows_is_as_asked_and_only_seed_and_id_choose_them() -> None:
    for fraction in (0.0, 0.1, 0.5, 1.0):
        chosen = [row for row in range(4000) if is_audited(7, row, fraction)]
        assert len(chosen) == pytest.approx(4000 * fraction, abs=120)
    few = {row for row in range(4000) if is_audited(7, row, 0.1)}
    more = {row for row in range(4000) if is_audited(7, row, 0.2)}
    other = {row for row in range(4000) if is_audited(8, row, 0.1)}
    assert few <= more and few != other
    assert [is_audited(7, str(row), 0.1) for row in range(99)] != [
        is_audited(7, row, 0.1) for row in range(99)
    ], "the integer 5 and the string 5 are two ids"


@pytest.mark.parametrize("n", [1, 3])
def test_audited_rows_come_back_once_with_their_audit(n: int) -> None:
    different = frozenset(range(0, 200, 3))
    engine = AuditedEngine(
        ScriptedEngine(Script(max_resident=7)), WholeEngine(Script(), different), 7, 0.4
    )
    results = run(engine, [work(key, range(40 * key, 40 * key + 40), n) for key in range(5)])
    found = [g for result in results for g in result.generations]
    assert Counter((g.row_id, g.sample_index) for g in found) == Counter(
        (row, sample) for row in range(200) for sample in range(n)
    ), "every generation comes out once"
    for generation in found:
        row_id = generation.row_id
        is_chosen = generation.sample_index == 0 and is_audited(7, row_id, 0.4)
        assert (generation.audit is not None) == is_chosen
        if generation.audit is not None:
            last = len(exits_of(row_id, 0)) - 1
            expected = last if row_id in different else None
            assert generation.audit.first_divergence == expected
            assert (generation.audit.distance > 0) == (row_id in different)
    assert engine.is_idle and engine.stats.tokens == sum(g.generated_tokens for g in found), (
        "what audits generate is no output"
    )


def test_no_failure_of_an_audit_is_an_error_row() -> None:
    bad, odd = frozenset({3, 5}), frozenset({5, 8})
    engine = AuditedEngine(
        ScriptedEngine(Script(failing=bad)), WholeEngine(Script(failing=odd)), 0, 1.0
    )
    first, second = run(engine, [work(1, range(6)), work(2, range(6, 12))])
    assert {failure.row_id for failure in first.failures} == bad
    assert not second.failures
    audits = {g.row_id: g.audit for g in [*first.generations, *second.generations]}
    assert {row for row, audit in audits.items() if audit is None} == {8}
    assert engine.is_idle


def test_a_chunk_of_another_phase_waits_for_an_empty_engine() -> None:
    made: list[tuple[Phase, ScriptedEngine]] = []

    def make(phase: Phase) -> RowEngine:
        assert all(engine.is_idle for _, engine in made), "the engine before is empty"
        made.append((phase, ScriptedEngine(Script(max_resident=4))))
        return made[-1][1]

    engine = PhasedEngine(make, "exits")
    chunks = [work(1, range(9)), work(2, range(9, 20), phase="full"), work(3, range(20, 30))]
    results = run(engine, chunks)
    assert [len(result.generations) for result in results] == [9, 11, 10]
    assert [phase for phase, _ in made] == ["exits", "full", "exits"]
    total = sum(len(exits_of(row, 0)) for row in range(30))
    assert engine.stats.tokens == total, "the counters go over all engines"


def test_a_prompt_that_the_new_engine_refuses_fails_alone() -> None:
    class Choosy(ScriptedEngine):
        def add(self, prompt: Prompt) -> None:
            if prompt.row_id == 5:
                raise PromptTooLongError("too long")
            super().add(prompt)

    engine = PhasedEngine(lambda phase: Choosy(Script(max_resident=2)), "exits")
    _, result = run(engine, [work(1, range(5)), work(2, range(5, 9), phase="full")])
    assert [failure.row_id for failure in result.failures] == [5]
    assert {g.row_id for g in result.generations if isinstance(g, Generation)} == {6, 7, 8}


@pytest.mark.parametrize("num_steps", [0, 3, 12, 20])
def test_what_is_given_up_is_forgotten_with_its_audits(num_steps: int) -> None:
    whole = WholeEngine(Script(max_resident=2))
    engine = AuditedEngine(ScriptedEngine(Script(max_resident=64)), whole, 0, 1.0)
    for tag in (1, 2):
        for row in range(8):
            engine.add(Prompt(row, [1, 2], 0, tag))
    found = [result for _ in range(num_steps) for result in engine.step()]
    num_open = 8 - sum(result.tag == 1 for result in found)
    assert engine.give_up(1) == num_open and engine.give_up(1) == 0
    while not engine.is_idle:
        found += engine.step()
    assert Counter(result.tag for result in found) == Counter({1: 8 - num_open, 2: 8})
    assert all(isinstance(r, Generation) and r.audit is not None for r in found if r.tag == 2)


def test_prompts_that_wait_for_another_phase_can_be_given_up() -> None:
    engine = PhasedEngine(lambda phase: ScriptedEngine(Script(max_resident=9)), "exits")
    for tag, phase in ((1, "exits"), (2, "full"), (3, "full")):
        for row in range(3):
            engine.add(Prompt(row, [1, 2], 0, tag, phase))
    assert [engine.give_up(tag) for tag in (1, 2, 7)] == [3, 3, 0]
    found = []
    while not engine.is_idle:
        found += engine.step()
    assert sorted((result.row_id, result.tag) for result in found) == [(0, 3), (1, 3), (2, 3)]
