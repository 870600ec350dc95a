"""Histories drawn at random: any small job, up to four crashes anywhere in it."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults.history import Job, Setting, live
from tests.faults.machine import Crash, Kind, Machine

MOST_CRASHES = 4
_rows = st.frozensets(st.integers(0, 17), max_size=8)
_settings = st.builds(
    Setting,
    files=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    chunk_rows=st.integers(1, 4),
    replicas=st.integers(1, 3),
    samples=st.integers(1, 2),
    failing=_rows,
    empty=_rows,
    mode=st.sampled_from(["plain", "plain", "learning", "audited"]),
)
# Drawn numbers are often small or repeated; a place made of one is anywhere.
_places = st.integers(0, 2**32 - 1).map(lambda number: random.Random(number).random())
_crash = st.tuples(_places, st.sampled_from(["kill", "power cut", "lost"]))
_crashes = st.integers(1, MOST_CRASHES).flatmap(
    lambda count: st.lists(_crash, min_size=count, max_size=count)
)


@dataclass
class Tally:
    """What was drawn, and what happened.

    Attributes:
        histories: how many, those of shrinking included.
        runs: of their jobs.
        zombies: attempts that were finished although nobody waited for them.
        by_crashes: how many histories had so many crashes that happened.
        kinds: crashes, by kind.
        reached: how often each named point was reached.
        crashed: how often a crash happened there.
    """

    histories: int = 0
    runs: int = 0
    zombies: int = 0
    by_crashes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    crashed: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        mine, others = vars(self), vars(other)
        return Tally(**{name: mine[name] + others[name] for name in mine})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """From what `vars` says of one."""
        return cls(**{k: Counter(v) if isinstance(v, dict) else v for k, v in data.items()})

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in sorted(self.kinds.items()))
        numbers = ", ".join(f"{number}: {n:,}" for number, n in sorted(self.by_crashes.items()))
        return (
            f"{self.histories:,} histories, {self.runs:,} runs of their jobs\n"
            f"histories by number of crashes: {numbers}\n"
            f"{self.crashed.total():,} crashes ({kinds}) at {len(self.crashed)} of "
            f"{len(self.reached)} named points that were reached; {self.zombies:,} attempts of "
            "zombies finished"
        )


def draw_histories(count: int, first_seed: int = 0) -> Tally:
    """Live so many drawn histories; the first that goes wrong is made smaller and raised.

    Args:
        count: how many.
        first_seed: another one, other histories.
    """
    tally, machine = Tally(), Machine()

    @seed(first_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(_settings, _crashes, st.integers(0, 2**32 - 1))
    def history(setting: Setting, places: list[tuple[float, Kind]], chance: int) -> None:
        with tempfile.TemporaryDirectory(prefix="eevp-history-") as folder:
            _live(setting, places, chance, Path(folder), machine, tally)

    history()
    tally.kinds.update(machine.kinds)
    tally.reached, tally.crashed = machine.reached, machine.crashed
    return tally


def _live(
    setting: Setting,
    places: list[tuple[float, Kind]],
    chance: int,
    folder: Path,
    machine: Machine,
    tally: Tally,
) -> None:
    undisturbed = Job(setting, folder / "undisturbed", Machine(), chance)
    live(undisturbed)
    # After a crash less is left to do, so that later crashes have to come sooner.
    length = len(undisturbed.machine.stretches[0])
    crashes = [
        Crash(1 + int(length / turn * place), kind)
        for turn, (place, kind) in enumerate(places, start=1)
    ]
    before = machine.crashed.total()
    job = Job(setting, folder / "disturbed", machine, chance)
    live(job, crashes)
    assert job.output() == undisturbed.output(), "the output is the undisturbed one"
    tally.histories += 1
    tally.runs += job.runs
    tally.zombies += job.zombies.num_finished
    tally.by_crashes[str(machine.crashed.total() - before)] += 1
