"""The workload benchmark goes from rows to a table; only figures that are known are judged."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from jinja2 import Template

from tests.bench import drift, replay, workloads
from tests.bench.machine import ROOT
from tests.bench.workloads_answers import last_number, starts_with
from tests.bench.workloads_jobs import WORKLOADS, Sizes
from tests.conftest import Figures
from tests.learning_jobs import save_shallow_model


def test_an_answer_is_right_by_what_its_workload_asks_for() -> None:
    assert starts_with(' {"year": 1931', '{"year": 1931}')
    assert not starts_with('So: {"year": 1931', '{"year": 1931}')
    assert last_number("3 + 4 = 7, so she has 1,207.0 in all.", "1,207")
    assert last_number("It is -3.", "-3") and not last_number("It is 3.", "-3")
    assert not last_number("7 of them, or 8", "7") and not last_number("none", "0")


def write_questions(path: Path, count: int) -> Path:
    lines = [
        {"question": f"What is {n} plus {n % 7}?", "answer": f"Add.\n#### {n + n % 7}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_to_learn_from_and_rows_to_judge_by_are_apart(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"instruction": f"Task {n}."}) + "\n" for n in range(40)))
    sources = {"gsm8k": write_questions(tmp_path / "questions.jsonl", 60), "self-instruct": tasks}
    for name, make in WORKLOADS.items():
        found = make(Sizes(20, 20, 10), sources.get(name))
        prompts = [row.get("prompt", row.get("text")) for row in found.learned + found.judged]
        assert len(found.learned) == 40 and len(found.judged) == 10
        assert len(set(prompts)) == 50, f"a prompt of {name} is there twice"
        again = make(Sizes(20, 20, 10), sources.get(name))
        assert (again.learned, again.judged) == (found.learned, found.judged)


@pytest.mark.parametrize(("change", "shown"), [("fields", '{"job": "tailor"'), ("prompts", None)])
def test_a_job_changes_its_prompts_in_the_middle(
    change: str, shown: str | None, tmp_path: Path
) -> None:
    WORKLOADS["extract"](Sizes(10, 10, 12), None).write(tmp_path, ROOT / "models", "float32")
    chosen = Namespace(
        workload=tmp_path, change=change, narrow_rows=8, changed_rows=4, stage="heads",
        delta="0.02", chunk_rows=4,
    )  # fmt: skip
    (tmp_path / "drift").mkdir()
    job = yaml.safe_load(drift.write_job(chosen, tmp_path / "drift").read_text())
    rows = pq.read_table(tmp_path / "drift" / "prompts.parquet").to_pylist()
    prompts = [Template(job["prompt"]["template"]).render(row) for row in rows]
    assert len(prompts) == 12
    assert all('{"name": "Pedro Alves"' in prompt for prompt in prompts[:8])
    for prompt, row in zip(prompts[8:], rows[8:], strict=True):
        assert row["text"] in prompt
        assert prompt == row["text"] if shown is None else shown in prompt
        assert '{"name": "Pedro Alves"' not in prompt


@pytest.mark.slow
def test_a_checkout_replays_as_fast_as_itself_by_count(tmp_path: Path, figures: Figures) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", 60)
    workload = WORKLOADS["gsm8k"](Sizes(20, 20, 10), questions)
    workload.write(tmp_path / "w", save_shallow_model(tmp_path / "shallow"), "float32")
    options = f"--job {tmp_path}/w/job.yaml --set exit.mode=on --set exit.layers=[2,4]"
    options += " --set sampling.max_new_tokens=8 --rows 6 --settings 3 --rounds 1"
    found = figures(replay, f"{options} --beside {ROOT}")
    assert found["rows"] == 6 and found["generated_tokens"] <= 6 * 8
    this, other = (found["checkouts"][name] for name in ("this", "other"))
    assert this["digest"] == other["digest"] and this["commit"] == other["commit"]
    assert found["fewer_token_layers"] == 1 and found["speed"] > 0
    fed = found["generated_tokens"] - 6
    assert this["token_layers"] > 6 * fed, "one setting runs everything, and prompts run"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_workload_is_taken_from_rows_to_certified_and_measured_exits(
    tmp_path: Path, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a model whose exits are known: after layer 2 of 6 nothing changes any more."""
    model = save_shallow_model(tmp_path / "shallow")
    questions = write_questions(tmp_path / "questions.jsonl", 260)
    options = f"--folder {tmp_path}/w --workloads gsm8k --gsm8k {questions}"
    options += f" --model {model} --dtype float32 --fit-rows 40 --calibration-rows 150"
    options += " --judged-rows 12 --deltas 0.01,0.1 --rounds 1 --processes 1"
    found = figures(workloads, f"{options} --plot {tmp_path}")["workloads"]["gsm8k"]
    assert set(found["fit"]["heads"]["layers"]) <= {1, 2, 3, 4, 5}
    assert found["look"]["lenses"][0]["oracle_saving"] >= 1 / 2, "the oracle leaves after layer 2"
    heads = found["certify"]["heads"]["deltas"]
    assert heads["0.01"]["certified"] is None and heads["0.01"]["rows_needed"] > 120
    table = capsys.readouterr().out
    assert "| gsm8k | " in table and "99%: no, " in table
    for name, point in found["pay"]["points"].items():
        assert point["speed"] > 0 and 0 <= point["disagreement"] <= 0.5
        assert found["judge"][name]["perplexity"] > 1 and found["audit"][name]["rows"] > 0
        assert "right_answers" in point
    verified = [p for n, p in found["policies"]["points"].items() if n.startswith("verify")]
    assert all(point["identical_rows"] == 1 for point in verified)
