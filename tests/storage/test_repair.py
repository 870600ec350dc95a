"""`submit --repair`: damaged chunks are done again, they alone, and a person is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eevp_batch.errors import JobFailedError, VerifyFailedError
from eevp_batch.storage.verify import verify
from tests.faults.history import Job, Setting, live
from tests.faults.machine import Machine

# Chunks of three rows; chunk 1 has both parts, chunk 2 only errors, chunk 4 is the last.
SETTING = Setting(files=(14,), chunk_rows=3, failing=frozenset({4, 6, 7, 8}))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A finished job that will be repaired."""
    job = Job(SETTING, tmp_path, Machine())
    live(job)
    job.settled.clear()
    job.messages.clear()
    job.repairs = True
    return job


def resume(job: Job) -> None:
    """Give the command again, after something was done to the folder."""
    job.watch.disk.adopt()
    live(job)


def out_of(job: Job) -> Path:
    return Path(job.watch.plain().text)


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def files(out: Path) -> dict[str, tuple[int, int]]:
    """What stands under the names of parts and records."""
    found = [*out.glob("*/part-*"), *out.glob("_eevp/commits/*")]
    return {path.stem[-5:] + path.parent.name: stamp(path) for path in found}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def alter_checksum(path: Path) -> None:
    record = json.loads(path.read_text())
    record["attempt"]["data_sha256"] = "0" * 64
    path.write_text(json.dumps(record))


def belong_elsewhere(path: Path) -> None:
    path.write_text(path.with_name("00000.json").read_text())


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "lost part": ("data/part-00001.parquet", Path.unlink, "the file is missing"),
    "bit rot": ("data/part-00001.parquet", flip, "the checksum is not the recorded one"),
    "torn part": ("errors/part-00001.parquet", cut, "not a readable Parquet file"),
    "lost errors": ("errors/part-00001.parquet", Path.unlink, "the file is missing"),
    "torn record": ("_eevp/commits/00001.json", cut, "damaged commit record"),
    "altered record": ("_eevp/commits/00001.json", alter_checksum, "the checksum is not"),
    "another chunk's record": ("_eevp/commits/00001.json", belong_elsewhere, "chunk_id is 0"),
    "lost record": ("_eevp/commits/00001.json", Path.unlink, "no commit record names this file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_chunk_is_done_again_and_no_other(job: Job, name: str) -> None:
    rel, damage, words = DAMAGE[name]
    out, expected, before = out_of(job), job.output(), files(out_of(job))
    damage(out / rel)
    found = verify(job.watch.plain())
    assert list(found.damaged) == [1], "verify names the chunk"
    resume(job)
    assert job.output() == expected, "the output is what it was"
    now = files(out)
    assert {key[:5] for key in now if now[key] != before[key]} == {"00001"}, "one chunk is redone"
    (message,) = [text for text in job.messages if text.startswith("repair: chunk")]
    assert "chunk 00001" in message and words in message and "00001." in message


def test_what_was_set_aside_is_kept_and_told(job: Job) -> None:
    out = out_of(job)
    record = (out / "_eevp/commits/00001.json").read_text()
    (out / "data/part-00001.parquet").unlink()
    (out / "errors/part-00002.parquet").unlink()
    resume(job)
    lines = map(json.loads, (out / "_eevp/events.jsonl").read_text().splitlines())
    events = [event for event in lines if event["event"] == "chunk_set_aside"]
    assert [event["chunk_id"] for event in events] == [1, 2]
    (aside,) = events[0]["records"]
    assert (out / aside).read_text() == record
    assert events[0]["problems"] == ["data/part-00001.parquet: the file is missing"]


def test_a_part_with_other_columns_does_not_condemn_its_neighbours(job: Job) -> None:
    """The first part is what others are compared with, unless it is the damaged one."""
    out = out_of(job)
    (out / "data/part-00000.parquet").write_bytes((out / "errors/part-00001.parquet").read_bytes())
    assert list(verify(job.watch.plain()).damaged) == [0]


def test_a_sound_output_is_left_alone(job: Job) -> None:
    before = files(out_of(job))
    resume(job)
    assert files(out_of(job)) == before
    assert "repair: no chunk is damaged" in job.messages


def test_nothing_is_repaired_unasked(job: Job) -> None:
    job.repairs = False
    out = out_of(job)
    (out / "data/part-00001.parquet").unlink()
    with pytest.raises(VerifyFailedError, match="the file is missing"):
        resume(job)
    cut(out / "_eevp/commits/00001.json")
    with pytest.raises(JobFailedError, match=r"commits/00001.json: damaged .* submit --repair"):
        resume(job)
    assert not (out / "data/part-00001.parquet").exists() and not (out / "_eevp/set_aside").exists()


def test_a_file_of_no_chunk_is_not_ours_to_take_away(job: Job) -> None:
    out = out_of(job)
    (out / "data/extra.parquet").write_bytes(b"")
    with pytest.raises(VerifyFailedError, match="extra"):
        resume(job)
    assert (out / "data/extra.parquet").exists()


def test_a_record_beyond_the_plan_is_set_aside(job: Job) -> None:
    out = out_of(job)
    (out / "_eevp/commits/00099.json").write_text("{}")
    resume(job)
    assert not (out / "_eevp/commits/00099.json").exists()
    assert any("chunk 00099" in text and "no such chunk" in text for text in job.messages)
