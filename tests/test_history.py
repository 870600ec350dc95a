"""The history of submissions: a run's id finds its output, and nothing depends on it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from eevp_batch.history import recall, remember


@pytest.fixture(autouse=True)
def own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "eevp-batch" / "runs.jsonl"


def test_a_run_is_known_as_it_was_submitted_last() -> None:
    assert recall() == []
    remember("a-1", "a", "/out/a")
    remember("b-1", "b", "s3://b/out", "http://head:8265", "b-1")
    remember("a-1", "a", "/out/a", "auto", "a-1.2")
    assert [(entry.run_id, entry.submission_id) for entry in recall()] == [
        ("b-1", "b-1"),
        ("a-1", "a-1.2"),
    ]


def test_lines_that_are_damaged_or_of_another_version_are_left_out(own_history: Path) -> None:
    remember("a-1", "a", "/out/a")
    with open(own_history, "a") as file:
        file.write('{"run_id": 1\n[1]\n{"other": true}\n\xff\n')
    remember("b-1", "b", "/out/b")
    assert [entry.run_id for entry in recall()] == ["a-1", "b-1"]


def test_several_at_once_do_not_mix_their_lines() -> None:
    names = [f"run-{number}" for number in range(40)]
    threads = [threading.Thread(target=remember, args=(name, "j", "/o")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.run_id for entry in recall()} == set(names)


def test_a_folder_that_cannot_be_written_changes_nothing(own_history: Path) -> None:
    own_history.parent.parent.write_text("a file in its place")
    remember("a-1", "a", "/out/a")
    assert recall() == []
