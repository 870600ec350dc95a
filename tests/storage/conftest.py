"""Stores of several kinds for the tests of this folder, one of them an S3 endpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eevp_batch.storage import location
from eevp_batch.storage.lock import LockTimes
from eevp_batch.storage.retries import Patience
from eevp_batch.storage.store import Store
from tests.s3_server import ENVIRONMENT, S3Server, s3_server
from tests.storage.jobs import stores

QUICK = Patience(first_s=0.01, longest_s=0.05, total_s=60.0)
QUICK_LOCK = LockTimes(beat_s=0.2, hold_s=0.6, silent_s=1.2, settle_s=0.1)
_numbers = itertools.count(1)


@pytest.fixture(params=["local", "mock"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder, on disk and elsewhere; modules that need other kinds have their own."""
    return dict(stores(tmp_path))[request.param]


@pytest.fixture(scope="session")
def _s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with s3_server() as server:
            yield server


@pytest.fixture
def s3(_s3: S3Server) -> Iterator[S3Server]:
    """The endpoint, behaving well until told otherwise."""
    _s3.faults.heal()
    yield _s3
    _s3.faults.heal()


@pytest.fixture
def open_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    """`open_s3(path)`: a store whose client leaves every other try to `retries`, in a hurry."""
    monkeypatch.setattr(location, "CLIENT_TRIES", 1)
    # Longer than a busy machine takes for an answer, shorter than a server that hangs.
    monkeypatch.setattr(location, "REQUEST_TIMEOUT_S", 3.0)

    def opened(path: str) -> Store:
        store = Store.open(s3.uri(path))
        store.patience, store.lock_times = QUICK, QUICK_LOCK
        return store

    return opened


@pytest.fixture
def s3_store(open_s3: Callable[[str], Store]) -> Store:
    """An empty folder in the bucket."""
    return open_s3(f"run {next(_numbers)}/out #1 100% ü")
