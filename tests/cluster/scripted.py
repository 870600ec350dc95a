"""An engine whose output follows from row ids alone, with deaths and errors where the script says.

It honours the protocol of `eevp_batch.cluster.engine_loop.RowEngine`, so it is hosted by the real
`Replica` actor, the real coordinator and the real storage.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eevp_batch.cluster.engine_loop import Build
from eevp_batch.errors import EmptyPromptError, EngineError, NonFiniteScoresError, RowTimeoutError
from eevp_batch.records import Generation, Prompt, RowFailure, RowId, TokenExit

NUM_LAYERS = 6
EXIT_LAYERS = (2, 4, 6)


@dataclass(frozen=True)
class Script:
    """What happens.

    Attributes:
        max_resident: sequences that the engine holds.
        step_s: seconds that a step takes.
        build_s: seconds that building takes.
        failing: rows that become error rows.
        late: rows that become error rows because their time is over.
        raising: rows whose admission raises an error that belongs to no row.
        killing: rows whose admission kills the process, by SIGKILL.
        hanging: rows with which a step never returns.
        unreadable: whether no chunk's rows are ever read.
        shortages: how often the engine says that memory ran out.
        slow_s: seconds that a step takes of the engine that creates `once`.
        hurry: a file; once it is there steps take no time.
        once: a file; killing and hanging happen only to the one that creates it.
        unbuildable: `error`, `bug` or `kill`: how the engine cannot be built.
        counting: a folder; each engine that is built leaves a file there.
    """

    max_resident: int = 8
    step_s: float = 0.0
    build_s: float = 0.0
    failing: frozenset[RowId] = frozenset()
    late: frozenset[RowId] = frozenset()
    raising: frozenset[RowId] = frozenset()
    killing: frozenset[RowId] = frozenset()
    hanging: frozenset[RowId] = frozenset()
    unreadable: bool = False
    shortages: int = 0
    slow_s: float | None = None
    hurry: str | None = None
    once: str | None = None
    unbuildable: str | None = None
    counting: str | None = None

    @property
    def build(self) -> Build:
        return partial(build_engine, self)


@dataclass
class ScriptedStats:
    exit_histogram: Counter[int] = field(default_factory=Counter)
    shortages: int = 0

    @property
    def tokens(self) -> int:
        return self.exit_histogram.total()


def exits_of(row_id: RowId, sample_index: int) -> list[TokenExit]:
    """1..6 tokens that depend on nothing but the row and the sample."""
    digest = hashlib.sha256(f"{row_id!r}/{sample_index}".encode()).digest()
    return [
        TokenExit(byte, EXIT_LAYERS[byte % 3], byte / 256) for byte in digest[1 : 2 + digest[0] % 6]
    ]


class ScriptedEngine:
    """One token per resident sequence and step."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.stats = ScriptedStats(shortages=script.shortages)
        self.resident: deque[tuple[Prompt, list[TokenExit], int]] = deque()
        self.most_resident = 0
        is_slow = script.slow_s is not None and self._is_first()
        self.step_s = (script.slow_s or 0.0) if is_slow else script.step_s

    @property
    def max_resident(self) -> int:
        return self.script.max_resident

    @property
    def has_room(self) -> bool:
        return len(self.resident) < self.script.max_resident

    @property
    def is_idle(self) -> bool:
        return not self.resident

    def add(self, prompt: Prompt) -> None:
        if not self.has_room:
            raise EngineError("added beyond the room there is")
        if prompt.row_id in self.script.raising:
            raise ZeroDivisionError(f"row {prompt.row_id!r} met a bug")
        if prompt.row_id in self.script.killing and self._is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        self.resident.append((prompt, exits_of(prompt.row_id, prompt.sample_index), 0))
        self.most_resident = max(self.most_resident, len(self.resident))

    def step(self) -> list[Generation | RowFailure]:
        if self.step_s and not (self.script.hurry and Path(self.script.hurry).exists()):
            time.sleep(self.step_s)
        finished: list[Generation | RowFailure] = []
        for _ in range(len(self.resident)):
            prompt, exits, done = self.resident.popleft()
            if prompt.row_id in self.script.hanging and self._is_first():
                threading.Event().wait()
            self.stats.exit_histogram[exits[done].exit_layer] += 1
            if done + 1 < len(exits):
                self.resident.append((prompt, exits, done + 1))
            else:
                finished.append(self._result(prompt, exits))
        return finished

    def give_up(self, tag: int) -> int:
        kept = [entry for entry in self.resident if entry[0].tag != tag]
        num_dropped, self.resident = len(self.resident) - len(kept), deque(kept)
        return num_dropped

    def _result(self, prompt: Prompt, exits: list[TokenExit]) -> Generation | RowFailure:
        if prompt.row_id in self.script.failing:
            name = NonFiniteScoresError.__name__
            return RowFailure(prompt.row_id, name, "scripted", tag=prompt.tag)
        if prompt.row_id in self.script.late:
            text = f"over {prompt.timeout_s} s"
            return RowFailure(prompt.row_id, RowTimeoutError.__name__, text, tag=prompt.tag)
        return Generation(
            row_id=prompt.row_id,
            sample_index=prompt.sample_index,
            prompt_tokens=len(prompt.token_ids),
            exits=exits,
            text="".join(chr(97 + exit.token_id % 26) for exit in exits),
            finish_reason="eos",
            seed=int.from_bytes(hashlib.sha256(repr(prompt.row_id).encode()).digest()[:8]),
            num_layers=NUM_LAYERS,
            tag=prompt.tag,
        )

    def _is_first(self) -> bool:
        if self.script.once is None:
            return True
        try:
            Path(self.script.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ScriptedEncoder:
    """One token per character; an empty prompt has none."""

    columns: Sequence[str] = ("prompt",)

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        if self.script.unreadable:
            threading.Event().wait()
        if not row["prompt"]:
            raise EmptyPromptError("the prompt is empty")
        return [ord(letter) for letter in row["prompt"]]


def build_engine(script: Script) -> tuple[ScriptedEngine, ScriptedEncoder]:
    """What a replica calls."""
    if script.counting is not None:
        (Path(script.counting) / f"{os.getpid()}-{time.time_ns()}").touch()
    time.sleep(script.build_s)
    if script.unbuildable == "error":
        raise EngineError("this model will never load")
    if script.unbuildable == "bug":
        raise OSError("the disk is busy")
    if script.unbuildable == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return ScriptedEngine(script), ScriptedEncoder(script)
