"""What a replica finds under other names on its own node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eevp_batch.cluster.own_node import at_home
from eevp_batch.errors import ModelError
from eevp_batch.model_config import read_model_config
from eevp_batch.spec import JobSpec


def job(model: Path, heads: Path) -> JobSpec:
    return JobSpec.model_validate(
        {
            "input": {"path": "s3://b/in"},
            "model": {"path": str(model)},
            "exit": {"heads": str(heads)},
            "output": {"path": "s3://b/out"},
        }
    )


def test_files_that_were_sent_along_lie_in_the_nodes_own_working_folder(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "head" / "work", tmp_path / "worker" / "work"
    (ours / "heads").mkdir(parents=True)
    monkeypatch.chdir(ours)
    model = read_model_config(job(tiny_llama, theirs).model)
    moved, same = at_home(job(tiny_llama, theirs / "heads"), model, str(theirs))
    assert moved.exit.heads == str(ours / "heads") and same is model
    elsewhere = job(tiny_llama, tmp_path / "nfs" / "heads")
    assert at_home(elsewhere, model, str(theirs))[0] == elsewhere, "what all see stays"
    (theirs / "heads").mkdir(parents=True)
    here = job(tiny_llama, theirs / "heads")
    assert at_home(here, model, str(theirs))[0] == here, "on the coordinator's own node too"


def test_a_model_that_lies_elsewhere_on_this_node_has_to_be_the_same(
    tmp_path: Path, tiny_llama: Path
) -> None:
    spec = job(tiny_llama, tmp_path)
    model = read_model_config(spec.model)
    there = replace(model, path=str(tmp_path / "cache of another machine"))
    assert at_home(spec, there, str(tmp_path))[1] == model
    other = replace(there, content_hash="0" * 64)
    with pytest.raises(ModelError, match="found another model on this node") as refused:
        at_home(spec, other, str(tmp_path))
    assert model.content_hash in str(refused.value)
