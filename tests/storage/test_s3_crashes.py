"""The crash histories of tests/faults on an object store over a network that fails as well."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from eevp_batch.storage.store import Store
from tests.faults.any_store import WatchedStore
from tests.faults.history import Watch
from tests.faults.machine import Machine
from tests.faults.sweep import SMALL, sweep
from tests.s3_server import S3Server


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crash_around_every_operation_on_s3(
    tmp_path: Path, s3: S3Server, open_s3: Callable[[str], Store]
) -> None:
    numbers = itertools.count()

    def watch(machine: Machine, folder: Path) -> Watch:
        path = f"crashes {next(numbers)}/out"
        return WatchedStore(machine, lambda: open_s3(path))

    s3.faults.at_random(0.05, ("500", "503", "lost", "cut"), seed=0)
    machine = sweep(SMALL, tmp_path, ("kill",), watch)
    assert set(machine.crashed) == set(machine.reached), "there was a crash at each point"
    assert {"before create_exclusive commit record", "after publish data part"} <= set(
        machine.crashed
    )
    kinds = {fault for fault, _ in s3.faults.injected}
    assert len(kinds) > 1, "the network failed as well"
    print(f"{machine.crashed.total()} crashes, {len(s3.faults.injected)} faults of the network")
