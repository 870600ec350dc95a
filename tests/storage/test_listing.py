"""Which files a job names, and that none is left out or taken in without a word."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs
import pytest

from eevp_batch.errors import InputError, UsageError
from eevp_batch.storage.listing import list_inputs
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, make_spec, run_job, write_input

NAMES = [
    "b.parquet",
    "a b.parquet",
    "c#d.parquet",
    "100%.parquet",
    "%41.parquet",
    "ü.parquet",
    "[x].parquet",
    "q?.parquet",
    "deep/e.parquet",
    "deep/er/f.parquet",
    "notes.txt",
    ".hidden.parquet",
    "_meta.parquet",
    "_temp/g.parquet",
    "deep/.h/i.parquet",
]
VISIBLE = [
    "%41.parquet",
    "100%.parquet",
    "[x].parquet",
    "a b.parquet",
    "b.parquet",
    "c#d.parquet",
    "deep/e.parquet",
    "deep/er/f.parquet",
    "q?.parquet",
    "ü.parquet",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "in #1 50% ü" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "in #1 50% ü"


def found(folder: Path, paths: str | Sequence[str]) -> list[str]:
    return [os.path.relpath(path, folder) for path in list_inputs(paths)]


def test_a_folder_gives_its_parquet_files_sorted(folder: Path) -> None:
    assert found(folder, str(folder)) == VISIBLE
    assert len(list_inputs(folder.as_uri())) == len(VISIBLE), "a URI finds the same"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".parquet")])
def test_a_file_is_taken_literally(folder: Path, name: str) -> None:
    assert found(folder, f"{folder}/{name}") == [name]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[bc]*.parquet", ["b.parquet", "c#d.parquet"]),
        ("?.parquet", ["b.parquet", "ü.parquet"]),
        ("deep/**/*.parquet", ["deep/e.parquet", "deep/er/f.parquet"]),
        ("*/*.parquet", ["_temp/g.parquet", "deep/e.parquet"]),
        ("**/f.*", ["deep/er/f.parquet"]),
        (".h*.parquet", [".hidden.parquet"]),
        ("*%*.parquet", ["%41.parquet", "100%.parquet"]),
    ],
)
def test_patterns_match_as_in_a_shell(folder: Path, pattern: str, expected: list[str]) -> None:
    assert found(folder, f"{folder}/{pattern}") == expected
    uri = folder.as_uri()
    texts = list_inputs(f"{uri}/{quote(pattern)}")
    assert [InputLocation(text).relative_to(folder) for text in texts] == expected, (
        "a URI matches the same files"
    )


class InputLocation:
    """Where a URI points, by pyarrow's own reading of it."""

    def __init__(self, text: str) -> None:
        assert text.startswith("file://"), "a URI stays a URI"
        self.path = pa.fs.FileSystem.from_uri(text)[1]

    def relative_to(self, folder: Path) -> str:
        return os.path.relpath(self.path, folder)


def test_a_list_keeps_its_order_and_names_each_file_once(folder: Path) -> None:
    paths = [f"{folder}/ü.parquet", f"{folder}/[bü]*.parquet", f"{folder}/a b.parquet"]
    assert found(folder, paths) == ["ü.parquet", "b.parquet", "a b.parquet"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.parquet", "no such file or folder"),
        ("z*.parquet", "a pattern that matches no file"),
        ("absent/*.parquet", "a pattern that matches no file"),
        ("empty", "a folder without *.parquet files"),
    ],
)
def test_what_names_no_file_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    for text in (f"{folder}/{name}", f"{folder.as_uri()}/{name}"):
        with pytest.raises(InputError) as caught:
            list_inputs(text)
        assert str(caught.value).startswith(f"{text}: input.path: found {message}; allowed: ")


def test_a_secret_in_an_input_uri_is_refused_unseen() -> None:
    with pytest.raises(UsageError) as caught:
        list_inputs("s3://me:hunter2@bucket/in/*.parquet")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["?.parquet", "a#b.parquet"])
def test_what_a_uri_would_drop_silently_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="bare # or"):
        list_inputs(f"{folder.as_uri()}/{name}")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (".", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET", "b.parquet"]),
        ("*.parquet", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET", "b.parquet"]),
        ("a*.parquet", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET"]),
        ("**/a.parquet", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET"]),
        ("a.parquet", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET"]),
        ("*", ["a.parquet/part-0.parquet", "a.parquet/part-1.PARQUET", "b.parquet", "notes"]),
    ],
)
def test_a_folder_that_is_called_like_a_file_is_read(
    tmp_path: Path, entry: str, expected: list[str]
) -> None:
    names = [
        "a.parquet/part-0.parquet",
        "a.parquet/part-1.PARQUET",
        "a.parquet/_temporary/x.parquet",
    ]
    for name in (*names, "b.parquet", "notes", "other/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert found(tmp_path, f"{tmp_path}/{entry}") == expected


@pytest.mark.parametrize("entry", [".", "*.parquet", "**/*.parquet"])
def test_a_link_that_leads_nowhere_is_not_left_out(folder: Path, entry: str) -> None:
    (folder / "lost.parquet").symlink_to(folder / "blobs/0123")
    with pytest.raises(InputError, match=r"lost\.parquet: input\.path: found a link that leads"):
        list_inputs(f"{folder}/{entry}")
    (folder / "lost.parquet").unlink()
    (folder / "notes.lnk").symlink_to(folder / "blobs/0123")
    assert found(folder, str(folder)) == VISIBLE, "other links are nobody's rows"


def test_a_link_to_a_folder_that_holds_it_is_refused(tmp_path: Path) -> None:
    """Followed, it would give every row forty times."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.parquet").touch()
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"again.*found a link to a folder that holds it"):
        list_inputs(str(tmp_path))


def test_a_link_is_followed(tmp_path: Path) -> None:
    write_input(tmp_path / "elsewhere/a.parquet", ["a"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "elsewhere/a.parquet")
    assert found(tmp_path / "in", str(tmp_path / "in")) == ["b.parquet", "linked/a.parquet"]
    with pytest.raises(InputError, match="id 'a' in row 0 and in row 0 of"):
        make_plan(make_spec(tmp_path / "in"), MODEL)


@pytest.mark.parametrize(
    ("entry", "out"),
    [
        ("in", "in/out"),
        ("in", "in"),
        ("in/**/*.parquet", "in/deep/out"),
        ("in/*/*/*.parquet", "in/out"),
        ("in/*", "in/out.parquet"),
        ("link", "in/out"),
    ],
)
def test_an_output_that_its_own_job_would_read_is_refused(
    tmp_path: Path, entry: str, out: str
) -> None:
    """Found on the first run: on the second one there would be other input than planned."""
    write_input(tmp_path / "in/a/b/c.parquet", ["a"])
    write_input(tmp_path / "in/d.parquet", ["b"])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    spec = make_spec(["/unrelated/e.parquet", f"{tmp_path}/{entry}"])
    for text in (f"{tmp_path}/{out}", (tmp_path / out).as_uri()):
        output = spec.output.model_copy(update={"path": text})
        with pytest.raises(InputError, match="would be taken for input"):
            make_plan(spec.model_copy(update={"output": output}), MODEL)


@pytest.mark.parametrize(
    ("entry", "out"),
    [("in", "in/_out"), ("in/*.parquet", "in/out"), ("in/d.parquet", "in"), ("in", "in.out")],
)
def test_an_output_beside_its_input_is_resumed(tmp_path: Path, entry: str, out: str) -> None:
    write_input(tmp_path / "in/d.parquet", ["a", "b"])
    spec = make_spec(tmp_path / entry)
    output = spec.output.model_copy(update={"path": f"{tmp_path}/{out}"})
    spec = spec.model_copy(update={"output": output})
    store = Store.open(spec.output.path)
    run_job(store, spec)
    assert open_plan(store, make_plan(spec, MODEL)).num_rows == 2
