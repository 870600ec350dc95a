"""How a cluster comes by a job's paths: seen there, sent along, or refused with their line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.cluster import sending
from eevp_batch.cluster.sending import Parcel, pack, unseen_here
from eevp_batch.errors import SpecError, UsageError
from eevp_batch.spec_file import read_spec
from eevp_batch.storage.sent_inputs import sent_name, take_in
from eevp_batch.storage.store import Store

JOB = """\
name: far
input:
  path: {input}
model:
  path: {model}
exit:
  heads: {heads}
output:
  path: {out}
"""


def write_job(folder: Path, **paths: str) -> Path:
    given = {"input": "in.parquet", "model": "org/model", "heads": "null", "out": "s3://b/out"}
    (folder / "job.yaml").write_text(JOB.format(**given | paths))
    return folder / "job.yaml"


def write_input(path: Path, rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(rows), "prompt": ["a"] * rows}), path)
    return path


def packed(job: Path, *seen: Path) -> Parcel:
    return pack(read_spec(job), str(job), [str(path) for path in seen], "http://head:8265")


def test_small_inputs_go_along_and_lie_in_the_output(tmp_path: Path) -> None:
    source = write_input(tmp_path / "two words" / "ä.parquet")
    parcel = packed(write_job(tmp_path, input="'two words/*.parquet'"))
    (sent,) = parcel.files
    assert sent == f"inputs/{sent_name(source)}" and sent.endswith("-_.parquet")
    assert parcel.overrides[0] == f'input.path=["s3://b/out/_eevp/{sent}"]'
    assert parcel.has_inputs
    (tmp_path / "sent").mkdir()
    parcel.write(tmp_path / "sent")
    assert (tmp_path / "sent" / sent).read_bytes() == source.read_bytes()
    assert (tmp_path / "sent" / "job.yaml").read_text() == (tmp_path / "job.yaml").read_text()
    store = Store.open(tmp_path / "out")
    for _ in range(2):
        take_in(store, tmp_path / "sent" / "inputs")
        assert store.read(f"_eevp/{sent}") == source.read_bytes()


def test_another_content_has_another_name(tmp_path: Path) -> None:
    names = {sent_name(write_input(tmp_path / "in.parquet", rows)) for rows in (3, 4, 3)}
    assert len(names) == 2, "what was planned is never replaced"


def test_what_all_nodes_see_stays_where_it_is(tmp_path: Path) -> None:
    seen = tmp_path / "nfs"
    seen.mkdir()
    paths = {"input": "nfs/in.parquet", "model": "./nfs/model", "heads": "nfs/heads"}
    parcel = packed(write_job(tmp_path, **paths, out="nfs/out"), seen)
    assert not parcel.files
    assert parcel.overrides == [
        f'input.path=["{seen}/in.parquet"]',
        f'model.path="{seen}/model"',
        f'exit.heads="{seen}/heads"',
        f'output.path="{seen}/out"',
    ]
    job = read_spec(tmp_path / "job.yaml")
    assert unseen_here(job, [str(seen)]) == [
        f"{seen}/{n}" for n in ("in.parquet", "model", "heads")
    ]
    write_input(seen / "in.parquet")
    assert f"{seen}/in.parquet" not in unseen_here(job, [str(seen)])


def test_fitted_exits_go_along_as_a_folder(tmp_path: Path) -> None:
    write_input(tmp_path / "in.parquet")
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "fitted.json").write_text("{}")
    parcel = packed(write_job(tmp_path, heads="heads"))
    assert parcel.files["heads/fitted.json"] == tmp_path / "heads" / "fitted.json"
    assert 'exit.heads="heads"' in parcel.overrides


@pytest.mark.parametrize(
    ("paths", "line", "field", "allowed"),
    [
        (
            {"out": "out"},
            9,
            "output.path",
            "a URI, or a path in a folder that cluster.shared_paths",
        ),
        ({"out": "file:///srv/out"}, 9, "output.path", "a URI, or a path in a folder"),
        ({"model": "./m"}, 5, "model.path", "a hub id, or a folder that is the same on every node"),
        ({"input": "gone.parquet"}, 3, "input.path", "files of at most 64 MiB in all"),
        ({"input": "[s3://b/in, gone]"}, 3, "input.path[1]", "files of at most 64 MiB in all"),
        ({"heads": "gone"}, 7, "exit.heads", "files of at most 64 MiB in all"),
    ],
)
def test_what_the_cluster_cannot_see_is_refused_with_its_line(
    tmp_path: Path, paths: dict[str, str], line: int, field: str, allowed: str
) -> None:
    write_input(tmp_path / "in.parquet")
    job = write_job(tmp_path, **paths)
    with pytest.raises(SpecError) as refused:
        packed(job, tmp_path / "nfs")
    error = refused.value
    assert (error.file, error.line, error.field) == (str(job), line, field)
    assert "a path of this machine that http://head:8265 does not see" in str(error)
    assert allowed.split(" that cluster")[0] in error.allowed
    assert f"cluster.shared_paths, {tmp_path / 'nfs'}" in error.allowed


def test_inputs_that_are_too_large_are_refused_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "MAX_SENT_BYTES", 100)
    write_input(tmp_path / "in.parquet")
    with pytest.raises(SpecError, match=r"input\.path: found .*in\.parquet, 0 MiB, a path of this"):
        packed(write_job(tmp_path))


def test_sent_inputs_follow_no_link_out_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    write_input(tmp_path / "sent" / "x.parquet")
    (tmp_path / "out" / "_eevp").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "_eevp" / "inputs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="found _eevp/inputs to be a link"):
        take_in(Store.open(tmp_path / "out"), tmp_path / "sent")
    assert not list((tmp_path / "elsewhere").iterdir())
