"""Histories drawn at random: any small job, up to four crashes anywhere in it."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

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
        crashes: how often a history had so many crashes that happened.
    """

    machine: Machine = field(default_factory=Machine)
    histories: int = 0
    runs: int = 0
    zombies: int = 0
    crashes: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(5), 0))

    def __str__(self) -> str:
        machine = self.machine
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in sorted(machine.kinds.items()))
        numbers = ", ".join(f"{number}: {count:,}" for number, count in self.crashes.items())
        return (
            f"{self.histories:,} histories, {self.runs:,} runs of their jobs\n"
            f"histories by number of crashes: {numbers}\n"
            f"{machine.crashed.total():,} crashes ({kinds}) at {len(machine.crashed)} of "
            f"{len(machine.reached)} named points that were reached; {self.zombies:,} attempts of "
            "zombies finished"
        )


def draw_histories(count: int, first_seed: int = 0) -> Tally:
    """Live so many drawn histories; the first that goes wrong is made smaller and raised.

    Args:
        count: how many.
        first_seed: another one, other histories.
    """
    tally = Tally()

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
            _live(setting, places, chance, Path(folder), tally)

    history()
    return tally


def _live(
    setting: Setting, places: list[tuple[float, Kind]], chance: int, folder: Path, tally: Tally
) -> None:
    undisturbed = Job(setting, folder / "undisturbed", Machine(), chance)
    live(undisturbed)
    # After a crash less is left to do, so that later crashes have to come sooner.
    length = len(undisturbed.machine.stretches[0])
    crashes = [
        Crash(1 + int(length / turn * place), kind)
        for turn, (place, kind) in enumerate(places, start=1)
    ]
    before = tally.machine.crashed.total()
    job = Job(setting, folder / "disturbed", tally.machine, chance)
    live(job, crashes)
    assert job.output() == undisturbed.output(), "the output is the undisturbed one"
    tally.histories += 1
    tally.runs += job.runs
    tally.zombies += job.zombies.num_finished
    tally.crashes[tally.machine.crashed.total() - before] += 1
