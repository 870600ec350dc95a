"""An output folder that others changed: nothing is written outside it, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.errors import JobFailedError, UsageError
from eevp_batch.storage import layout
from eevp_batch.storage.commit_record import CommitRecord
from eevp_batch.storage.learned import read_learned
from eevp_batch.storage.plan import Plan, make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.storage.jobs import MODEL, make_spec, run_job, write_input


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(make_spec(write_input(tmp_path / "in.parquet", ["a", "b", "c"])), MODEL)


@pytest.mark.parametrize(
    "rel", ["data", "errors", "_eevp", "_eevp/commits", "_eevp/events.jsonl", "_eevp/lock"]
)
def test_a_link_out_of_the_output_is_refused(tmp_path: Path, plan: Plan, rel: str) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    (elsewhere / "x").mkdir(parents=True)
    (out / rel).parent.mkdir(parents=True)
    (out / rel).symlink_to(elsewhere / "x")
    with pytest.raises(UsageError, match=rf"found {rel} to be a link to .*elsewhere/x"):
        open_plan(Store.open(out), plan)
    assert list(elsewhere.rglob("*")) == [elsewhere / "x"]


def test_the_output_and_its_input_may_be_reached_by_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    source = write_input(tmp_path / "real.parquet", ["a", "b"])
    (tmp_path / "in.parquet").symlink_to(source)
    spec = make_spec(tmp_path / "in.parquet")
    run_job(Store.open(tmp_path / "out"), spec)
    assert (tmp_path / "real" / "_SUCCESS").is_file()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "", "..", ".hidden"])
def test_learned_files_are_named_without_a_path(tmp_path: Path, name: str) -> None:
    store = Store.open(tmp_path)
    store.write(layout.LEARNED, json.dumps({"reason": None, "files": {name: "0"}}).encode())
    with pytest.raises(JobFailedError, match=r"learned\.json is damaged: files: found"):
        read_learned(store)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (["num_rows"], "3", "num_rows: found '3'; allowed: an integer"),
        (["num_rows"], True, "num_rows: found True"),
        (["num_rows"], 2**64, "an integer of at most 64 bits"),
        (["id_type"], "float", "allowed: one of 'string', 'int64'"),
        (["fields"], [], "fields: found"),
        (["fields", "sampling.n"], None, "fields: sampling.n: found None"),
        (["fields", "exit.layers"], [None, 6], "fields: exit.layers[0]: found None"),
        (["fields", "exit.layers"], [], "fields: exit.layers: found none"),
        (["fields", "input.prompt_column"], ["a"], "fields: input.prompt_column: found"),
        (["files", 0, 1], None, "files[0].num_rows: found None"),
        (["files", 0, 0], "\ud800", r"files[0].path: found '\ud800'; allowed: text that UTF-8 can"),
        (["chunks", 0, 1], 7, "chunk 0"),
        (["chunks", 0, 0], 7, "chunk 0"),
        (["chunks", 0, 2], -1, "chunk 0"),
    ],
)
def test_a_plan_with_a_wrong_value_names_it(
    plan: Plan, place: list[Any], value: Any, told: str
) -> None:
    document = json.loads(plan.to_json())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(JobFailedError) as caught:
        Plan.from_json(json.dumps(document))
    assert str(caught.value).startswith("_eevp/plan.json is damaged: ")
    assert told in str(caught.value)


def test_nested_json_is_damage(plan: Plan) -> None:
    for read in (Plan.from_json, CommitRecord.from_json):
        with pytest.raises(JobFailedError, match="damaged"):
            read("[" * 100_000)
