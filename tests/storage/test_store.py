"""Every store keeps the same promises; a local disk keeps some more."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eevp_batch.errors import UsageError
from eevp_batch.storage.store import Store, is_temporary
from tests.storage.jobs import stores, takers

KINDS = ["local", "file URI", "subtree", "mock"]


@pytest.fixture(params=[*KINDS, "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        found: Store = request.getfixturevalue("s3_store")
        return found
    return dict(stores(tmp_path))[request.param]


def test_every_kind_is_tested(tmp_path: Path) -> None:
    assert [name for name, _ in stores(tmp_path)] == KINDS


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b/file #1 100% ü", b"first")
    store.write("a/b/file #1 100% ü", b"second")
    assert store.read("a/b/file #1 100% ü") == b"second", "a second write replaces the first"
    assert store.size("a/b/file #1 100% ü") == 6
    assert store.sha256("a/b/file #1 100% ü").startswith("16367aac"), "sha256 of 'second'"
    assert store.list("a/b") == ["file #1 100% ü"], "no temporary file is left"


def test_what_is_not_there(store: Store) -> None:
    assert not store.exists("nothing")
    assert store.list("nothing") == []
    assert list(store.read_lines("nothing")) == []
    store.delete("nothing", missing_ok=True)
    for call in (store.read, store.size, store.delete, store.sha256):
        with pytest.raises(FileNotFoundError):
            call("nothing")


def test_an_exclusive_name_is_taken_once(store: Store) -> None:
    store.create_exclusive("commits/00001.json", b"one")
    with pytest.raises(FileExistsError):
        store.create_exclusive("commits/00001.json", b"two")
    assert store.read("commits/00001.json") == b"one", "the loser changes nothing"
    assert store.list("commits") == ["00001.json"], "the loser leaves no temporary file"


def test_publishing_replaces(store: Store) -> None:
    store.write("attempts/x", b"new")
    store.write("data/part", b"old")
    store.publish("attempts/x", "data/part")
    assert store.read("data/part") == b"new"
    assert store.list("attempts") == [], "a published attempt has left its old name"


def test_lists_are_sorted_and_hold_files_only(store: Store) -> None:
    for name in ("b", "a", "c/d"):
        store.write(f"folder/{name}", b"")
    assert store.list("folder") == ["a", "b"]


def test_lines_come_back_in_order(store: Store) -> None:
    for number in range(12):
        store.append_line("_eevp/events.jsonl", f"line {number} ü")
    assert list(store.read_lines("_eevp/events.jsonl")) == [f"line {n} ü" for n in range(12)]


def test_a_file_is_read_from_anywhere(store: Store) -> None:
    store.write("data/file", b"abcdef")
    with store.open_input("data/file") as stream:
        assert bytes(stream.read_at(2, 2)) == b"cd"


def test_temporary_names_are_hidden_beside_their_file(store: Store) -> None:
    folder, _, name = store.temporary_name("data/part-00001.parquet").rpartition("/")
    assert folder == "data"
    assert is_temporary(name) and not is_temporary("part-00001.parquet")
    assert store.temporary_name("x") != store.temporary_name("x")


def test_content_is_synced_before_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = Store.open(tmp_path), []

    def name(path: str) -> str:
        text = os.path.relpath(path, tmp_path)
        return "temporary" if is_temporary(os.path.basename(text)) else text

    def record(kind: str, of: Callable[..., str]) -> None:
        real = getattr(os, kind)
        monkeypatch.setattr(
            os, kind, lambda *args: (calls.append(f"{kind} {of(*args)}"), real(*args))
        )

    record("fsync", lambda descriptor: name(os.readlink(f"/proc/self/fd/{descriptor}")))
    record("replace", lambda src, dst: f"{name(src)} to {name(dst)}")
    record("link", lambda src, dst: f"{name(src)} to {name(dst)}")
    record("mkdir", lambda path: name(path))
    store.write("new/file", b"1")
    assert calls == [
        "mkdir new",
        "fsync .",
        "fsync temporary",
        "fsync new",
        "replace temporary to new/file",
        "fsync new",
    ]
    calls.clear()
    store.create_exclusive("new/record", b"1")
    assert calls == ["fsync temporary", "fsync new", "link temporary to new/record", "fsync new"]


def test_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    (tmp_path / "events").write_text('{"a": 1}\n{"b"')
    store.append_line("events", '{"c": 3}')
    assert list(store.read_lines("events")) == ['{"a": 1}', '{"b"', '{"c": 3}']


def test_an_exclusive_name_needs_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(src: str, dst: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_an_exclusive_name_is_taken_once(Store.open(tmp_path))


def test_of_many_threads_one_takes_a_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    won = takers(store, lambda number: str(number).encode() * 1000)
    assert len(won) == 1, "exactly one thread creates the record"
    assert store.read("record") == str(won[0]).encode() * 1000


def test_a_lock_holds_off_other_processes_and_ends_with_its_own(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    assert store.is_locked("lock") is None, "nobody ever held it"
    held = (
        "import sys, time\n"
        "from eevp_batch.storage.store import Store\n"
        "with Store.open(sys.argv[1]).lock('lock'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", held, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert store.is_locked("lock") is True
        with pytest.raises(UsageError, match="another process"), store.lock("lock"):
            pytest.fail("the lock is held by another process")
        process.kill()
        process.wait()
    assert store.is_locked("lock") is False, "a killed process holds nothing"
    with store.lock("lock"):
        assert store.is_locked("lock") is True


def test_a_store_opens_again_from_its_text(tmp_path: Path) -> None:
    for name, store in stores(tmp_path):
        if name in ("local", "file URI"):
            store.write("x", b"1")
            assert Store.open(store.text).read("x") == b"1"


@pytest.mark.parametrize(
    "uri",
    ["s3://key:hunter2@bucket/out", "s3://bucket/out?secret_key=hunter2", "nonsense://bucket/out"],
)
def test_unusable_uris_are_refused_without_showing_a_secret(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        Store.open(uri)
    assert "hunter2" not in str(caught.value)
    assert "bucket/out" in str(caught.value)
