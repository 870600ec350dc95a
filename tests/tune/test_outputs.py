"""Where rows are from is told so that files can be moved and published."""

from __future__ import annotations

from pathlib import Path

import pytest

from eevp_batch.spec import JobSpec
from eevp_batch.tune.outputs import data_facts


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/data/in/*.parquet", "../in/*.parquet"),
        (["/data/a.parquet", "s3://bucket/b"], ["../a.parquet", "s3://bucket/b"]),
        (["/data/exits/in.parquet"], "in.parquet"),
    ],
)
def test_input_is_told_as_the_folder_sees_it(given: str | list[str], told: str | list[str]) -> None:
    places = {"input": {"path": given}, "model": {"path": "m"}, "output": {"path": "o"}}
    spec = JobSpec.model_validate({"version": 1, **places})
    facts = data_facts(spec, "/data/full", 7, Path("/data/exits"))
    assert facts == {"input": told, "from": "../full", "seed": 7}
    assert data_facts(spec, None, 7, Path("/data/exits"))["from"] is None
