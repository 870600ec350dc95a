"""What may pass is tried again, for a bounded time; what does not is told at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.errors import StorageError
from eevp_batch.storage import retries
from eevp_batch.storage.retries import NO_PATIENCE, Patience, keep_trying, may_pass
from eevp_batch.storage.store import Store

QUICK = Patience(first_s=0.001, longest_s=0.002, total_s=60.0)


class Flaky:
    """Fails with each of some errors, then answers."""

    def __init__(self, *errors: OSError, answer: str = "done") -> None:
        self.errors, self.answer, self.calls = list(errors), answer, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.answer


PASSING = [
    OSError(errno.EIO, "i/o error"),
    OSError(errno.ESTALE, "stale handle"),
    TimeoutError(errno.ETIMEDOUT, "timed out"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."),
    OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"),
    OSError("AWS Error UNKNOWN (HTTP status 502) during GetObject operation"),
    OSError("Server returned non-2xx status code: 503 Service Unavailable"),
    OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted"),
    OSError(255, "Unknown error 255"),
]
FINAL = [
    FileNotFoundError(errno.ENOENT, "not found"),
    FileNotFoundError("no such bucket; retry_timeout: 60s"),
    FileExistsError("taken"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.EROFS, "read-only file system"),
    OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied"),
    OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_pass_is_tried_again(error: OSError) -> None:
    flaky = Flaky(error, error)
    assert keep_trying(flaky, "it", QUICK) == "done"
    assert flaky.calls == 3


@pytest.mark.parametrize("error", FINAL, ids=str)
def test_what_does_not_pass_is_raised_as_it_is(error: OSError) -> None:
    flaky = Flaky(error)
    with pytest.raises(type(error)) as caught:
        keep_trying(flaky, "it", QUICK)
    assert caught.value is error and flaky.calls == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_at_once(number: int) -> None:
    flaky = Flaky(OSError(number, "no room"))
    with pytest.raises(StorageError, match=r"writing x: no space is left .* make room"):
        keep_trying(flaky, "writing x", QUICK)
    assert flaky.calls == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retries.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    flaky = Flaky(*[OSError(errno.ETIMEDOUT, "timed out")] * 10_000)
    with pytest.raises(StorageError, match=r"failed \d+ times in \d+ s: .*timed out") as caught:
        keep_trying(flaky, "it", Patience())
    assert not may_pass(caught.value), "whoever is asked to try again later does not"
    assert 570.0 < now[0] - 1000.0 <= 600.0, "ten minutes, the last pause left out"
    assert 25 < flaky.calls < 60, "pauses grow to half a minute"
    flaky, start = Flaky(*[OSError(errno.EIO, "i/o error")] * 10_000), now[0]
    with pytest.raises(StorageError):
        keep_trying(flaky, "it", Patience())
    assert now[0] - start <= retries.EIO_PATIENCE_S, "a broken disk is given up sooner"


def test_pauses_are_cut_by_chance() -> None:
    pauses = {Patience(1.0, 8.0).pause_s(3) for _ in range(20)}
    assert len(pauses) > 1 and all(2.0 <= pause <= 4.0 for pause in pauses)
    assert all(4.0 <= Patience(1.0, 8.0).pause_s(5000) <= 8.0 for _ in range(20))


def test_a_refusal_after_a_lost_answer_may_mean_done() -> None:
    lost, refused = OSError(errno.ETIMEDOUT, "timed out"), FileExistsError("taken")
    assert keep_trying(Flaky(lost, refused), "it", QUICK, lambda: "ours") == "ours"
    with pytest.raises(FileExistsError):
        keep_trying(Flaky(lost, refused), "it", QUICK, lambda: None)
    with pytest.raises(FileExistsError):
        keep_trying(Flaky(refused), "it", QUICK, lambda: "ours")


@pytest.mark.parametrize("operation", ["write", "create_exclusive"])
def test_a_full_disk_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store = Store.open(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space is left"):
        getattr(store, operation)("x", b"content")
    assert os.listdir(tmp_path) == []


def test_a_rename_whose_answer_was_lost_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename, answers = Store.open(tmp_path), os.replace, ["lost"]
    store.patience = QUICK
    store.write("attempt", b"new")
    store.write("part", b"old")

    def replace(*paths: Any) -> None:
        rename(*paths)
        if answers:
            answers.pop()
            raise OSError(errno.ETIMEDOUT, "the server has not answered")

    monkeypatch.setattr(os, "replace", replace)
    store.publish("attempt", "part")
    assert store.read("part") == b"new"
    with pytest.raises(FileNotFoundError):
        store.publish("attempt", "part")


def test_a_link_whose_answer_was_lost_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, link = Store.open(tmp_path), os.link
    store.patience = QUICK

    def taken(*paths: Any) -> None:
        link(*paths)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", taken)
    store.create_exclusive("record", b"mine")
    assert store.list("") == ["record"]
    with pytest.raises(FileExistsError):
        store.create_exclusive("record", b"mine")


def test_a_view_without_patience_is_the_same_folder(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    hasty = store.with_patience(NO_PATIENCE)
    hasty.write("x", b"1")
    assert store.read("x") == b"1"
    assert (hasty.patience, store.patience) == (NO_PATIENCE, Patience())
