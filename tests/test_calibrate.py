"""`eevp-batch calibrate`, and jobs that take what it wrote."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from eevp_batch.calibration_file import Calibration
from eevp_batch.cli import main
from eevp_batch.engine.load import load_engine
from eevp_batch.errors import CalibrationError, InputError, SpecError, UsageError
from eevp_batch.prepare import PreparedJob, check_prompts, prepare
from eevp_batch.records import Generation, Prompt, RowFailure, RowId
from eevp_batch.spec_file import dump_spec, load_spec_text
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.commit import Committer, write_attempt
from eevp_batch.storage.plan import open_plan
from eevp_batch.tune.job_rows import drawn_prompts, output_rows
from eevp_batch.tune.states import prompt_key
from tests.storage.retrying import retry
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import without_layers

NUM_ROWS = 180
LOOSE = ("--delta", 0.05, "--epsilon", 0.1, "--rows", NUM_ROWS, "--settings", 6)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_job(folder: Path, model: Path, **exit: Any) -> Path:
    """A job whose prompts all differ."""
    rng = random.Random(3)
    words = ["the", "fox", "dog", "list", "house", "answer", "question", "letter"]
    prompts = [f"{row} " + " ".join(rng.choices(words, k=4)) for row in range(NUM_ROWS)]
    table = pa.table({"id": range(NUM_ROWS), "prompt": prompts})
    pq.write_table(table, folder / "in.parquet", row_group_size=50)
    fields = {
        "input": {"path": "in.parquet"},
        "prompt": {"chat": False},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": {"layers": [3], "vocab": {"top_k": 32}, **exit},
        "sampling": {"max_new_tokens": 8},
        "engine": {"max_batch": 16},
        "run": {"chunk_rows": 40},
        "output": {"path": "out"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def agreeing_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers behind the third add nothing."""
    folder = tmp_path_factory.mktemp("agreeing")
    without_layers(tiny_llama, after=3, save=folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(agreeing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A job, its calibration beside it as `c.json`, and what the command printed."""
    folder = tmp_path_factory.mktemp("job")
    job = write_job(folder, agreeing_model, threshold=0.5)
    plot = ("--plot", folder / "plot.svg")
    done = invoke("calibrate", job, "--out", folder / "c.json", *LOOSE, *plot, "--json")
    assert done.exit_code == 0, done.stderr
    job.write_text(job.read_text().replace("threshold: 0.5", "calibration: c.json"))
    return job, json.loads(done.stdout)


def test_a_job_is_calibrated_and_confirmed(calibrated: tuple[Path, Any]) -> None:
    job, found = calibrated
    written = Calibration.load(job.parent / "c.json")
    chosen = found["settings"][found["certified"]]
    assert list(written.thresholds) == chosen["thresholds"] and written.exit_share > 0.99
    assert (found["num_tuning_rows"], written.num_rows) == (36, 108)
    assert written.facts["confirmation"] == found["confirmation"]
    confirmation = found["confirmation"]
    assert confirmation["rows"] == 36 and confirmation["identical"] == 1
    assert confirmation["exit_share"] > 0.9 and confirmation["tokens_per_s_on"] > 0
    chart = (job.parent / "plot.svg").read_text()
    assert chart.startswith("<svg") and "certified" in chart and "measured, freely" in chart


def test_the_grid_is_printed_whole(agreeing_model: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, agreeing_model)
    done = invoke("calibrate", job, "--out", tmp_path / "c.json", *LOOSE, "--grid")
    assert done.exit_code == 0, done.stderr
    assert "never" in done.stdout and "  certified" in done.stdout
    assert "certified: risk at most 0.05 but for a probability of 0.1" in done.stdout
    assert "rows as at full depth 100.0 %" in done.stdout


def test_without_enough_rows_nothing_is_written(agreeing_model: Path, tmp_path: Path) -> None:
    job, out = write_job(tmp_path, agreeing_model), tmp_path / "c.json"
    done = invoke("calibrate", job, "--out", out, "--rows", 60, "--settings", 4)
    assert done.exit_code == 2 and not out.exists()
    assert "36 calibration rows cannot show a risk of at most 0.01" in done.stderr
    for setting in ("sampling.temperature=0.7", "exit.mode=off"):
        done = invoke("calibrate", job, "--out", out, "--set", setting)
        assert done.exit_code == 2 and setting.split("=")[0] in done.stderr


# --- jobs that take it -----------------------------------------------------------------------


def test_a_job_runs_with_certified_thresholds(calibrated: tuple[Path, Any], tmp_path: Path) -> None:
    job, _ = calibrated
    certified = Calibration.load(job.parent / "c.json")
    prepared = prepare(str(job))
    assert prepared.spec.exit.threshold == list(certified.thresholds)
    assert prepared.spec.exit.calibration == str(job.parent / "c.json")
    assert prepared.plan.fields["exit.threshold"] == list(certified.thresholds)
    assert "exit.calibration" not in prepared.plan.fields
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text((job.parent / "c.json").read_text())
    moved = prepare(str(job), [f"exit.calibration={elsewhere}"])
    assert moved.plan.fingerprint == prepared.plan.fingerprint, "where the file is changes nothing"
    auto = prepare(str(job), ["exit.layers=auto"])
    assert auto.plan.fingerprint == prepared.plan.fingerprint, "layers are those certified"
    assert load_spec_text(dump_spec(prepared.spec), "resolved", "/").exit.calibration
    engine, encoder = load_engine(prepared.spec, prepared.model)
    prompt = Prompt(0, encoder.encode({"prompt": "the quick fox"}))
    result = next(engine.generate([prompt]))
    assert isinstance(result, Generation) and set(result.exit_layers) == {3}


MISMATCHES = {
    "exit.layers=[2]": "exit.layers: certified [3, 6], found [2, 6]",
    "exit.confidence=max_prob": "exit.confidence: certified 'margin', found 'max_prob'",
    "exit.vocab.top_k=16": "exit.vocab.top_k: certified 32, found 16",
    "exit.kv=recompute": "exit.kv: certified 'propagate', found 'recompute'",
    "model.dtype=bfloat16": "model.dtype: certified 'float32', found 'bfloat16'",
    "sampling.max_new_tokens=9": "sampling.max_new_tokens: certified 8, found 9",
    "sampling.temperature=0.5": "sampling.temperature: found 0.5; allowed: 0",
    "exit.calibration=none.json": "none.json: cannot be read",
}


@pytest.mark.parametrize("override", MISMATCHES)
def test_a_job_that_is_not_the_certified_one_is_refused(
    override: str, calibrated: tuple[Path, Any]
) -> None:
    with pytest.raises(CalibrationError) as caught:
        prepare(str(calibrated[0]), [override])
    assert MISMATCHES[override] in str(caught.value)
    assert any("exit.calibration is set" in note for note in caught.value.__notes__)


def test_another_model_is_refused(calibrated: tuple[Path, Any], tiny_llama: Path) -> None:
    with pytest.raises(CalibrationError, match=r"model\.content_hash: certified"):
        prepare(str(calibrated[0]), [f"model.path={tiny_llama}"])


def test_thresholds_come_from_one_place(calibrated: tuple[Path, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        prepare(str(calibrated[0]), ["exit.threshold=0.9"])
    assert "exit.threshold: found 0.9; allowed: nothing beside exit.calibration" in str(
        caught.value
    )


def test_exits_off_need_no_certificate(calibrated: tuple[Path, Any]) -> None:
    spec = prepare(str(calibrated[0]), ["exit.mode=off", "exit.confidence=max_prob"]).spec
    assert spec.exit.mode == "off"


# --- rows ------------------------------------------------------------------------------------


def test_prompts_are_drawn_at_random_and_fitted_ones_left_out(
    agreeing_model: Path, tmp_path: Path
) -> None:
    job = prepare(str(write_job(tmp_path, agreeing_model)))
    encoder = check_prompts(job)
    every = drawn_prompts(job.spec.input, encoder, 1000, seed=0)
    assert len(every) == NUM_ROWS == len({prompt_key(ids) for ids in every})
    some = drawn_prompts(job.spec.input, encoder, 40, seed=1)
    assert some == drawn_prompts(job.spec.input, encoder, 40, seed=1)
    assert some != drawn_prompts(job.spec.input, encoder, 40, seed=2)
    assert {prompt_key(ids) for ids in some} <= {prompt_key(ids) for ids in every}
    keys = [prompt_key(ids) for ids in some[:30]]
    left = drawn_prompts(job.spec.input, encoder, 40, seed=1, without=keys)
    assert len(left) == 40 and not {prompt_key(ids) for ids in left} & set(keys)
    rest = drawn_prompts(job.spec.input, encoder, 1000, seed=1, without=keys)
    assert len(rest) == NUM_ROWS - 30
    limited = job.spec.input.model_copy(update={"limit": 50})
    in_order = [encoder.encode(row) for row in iter_rows(pq.read_table(tmp_path / "in.parquet"))]
    drawn = drawn_prompts(limited, encoder, 1000, seed=0)
    assert sorted(drawn) == sorted(in_order[:50])
    with pytest.raises(InputError, match="no row to draw"):
        drawn_prompts(job.spec.input, encoder, 40, seed=1, without=map(prompt_key, every))


def finish(job: PreparedJob) -> None:
    """Run a job without Ray."""
    plan = open_plan(job.store, job.plan, dump_spec(job.spec))
    committer = Committer(job.store, plan)
    engine, encoder = load_engine(job.spec, job.model)
    for chunk in plan.chunks:
        source = read_chunk(plan, chunk, encoder.columns)
        rows = list(iter_rows(source))
        results = list(engine.generate([Prompt(row["id"], encoder.encode(row)) for row in rows]))
        good = [result for result in results if isinstance(result, Generation)]
        bad = [RowFailure(good.pop().row_id, "EmptyPromptError", "scripted")]
        committer.commit(
            write_attempt(
                job.store, plan, job.spec, chunk, 1, 1, source, good, bad, "replica-0", 1.0
            ),
            1,
        )
    committer.finish({"replicas": 1})


def try_again(job: PreparedJob) -> None:
    """Do the rows in error again; now they come out."""
    engine, encoder = load_engine(job.spec, job.model)
    (file,) = job.plan.files
    rows = {row["id"]: row for row in iter_rows(pq.read_table(file.path))}

    def redo(ids: Sequence[RowId]) -> list[Generation]:
        found = engine.generate([Prompt(row_id, encoder.encode(rows[row_id])) for row_id in ids])
        return [result for result in found if isinstance(result, Generation)]

    retry(job.store, job.spec, redo)


def test_a_finished_output_serves_as_well(agreeing_model: Path, tmp_path: Path) -> None:
    path, out = write_job(tmp_path, agreeing_model), tmp_path / "out"
    off = prepare(str(path), ["exit.mode=off"])
    with pytest.raises(UsageError, match="holds no job"):
        output_rows(str(out), {}, check_prompts(off), 9, 0)
    finish(off)
    job, encoder = prepare(str(path)), check_prompts(off)
    rows = output_rows(str(out), job.plan.fields, encoder, 1000, seed=0)
    assert len(rows) == NUM_ROWS - len(off.plan.chunks), "a row of each chunk is in error"
    engine, _ = load_engine(off.spec, off.model)
    prompts = [Prompt(number, list(row.prompt_ids)) for number, row in enumerate(rows[:5])]
    for result in engine.generate(prompts):
        assert isinstance(result, Generation)
        assert result.token_ids == rows[int(result.row_id)].generated_ids, "prompt and output match"
    try_again(off)
    assert len(output_rows(str(out), job.plan.fields, encoder, 1000, seed=0)) == NUM_ROWS
    key = prompt_key(rows[0].prompt_ids)
    fewer = output_rows(str(out), job.plan.fields, encoder, 1000, seed=0, without=[key])
    assert len(fewer) == NUM_ROWS - 1
    options = ("--out", tmp_path / "c.json", *LOOSE, "--from", out)
    done = invoke("calibrate", path, *options)
    assert done.exit_code == 0, done.stderr
    assert "generating for" not in done.stderr, "nothing is generated that is there"
    done = invoke("calibrate", path, *options, "--set", "sampling.max_new_tokens=9")
    assert done.exit_code == 2
    assert "sampling.max_new_tokens: found 8; allowed: 9, as in the job" in done.stderr
    (out / "_SUCCESS").unlink()
    assert "not finished" in invoke("calibrate", path, *options).stderr


def test_an_output_with_exits_is_refused(agreeing_model: Path, tmp_path: Path) -> None:
    path = write_job(tmp_path, agreeing_model)
    job = prepare(str(path))
    finish(job)
    with pytest.raises(UsageError, match=r"exit\.mode: found on; allowed: off"):
        output_rows(str(tmp_path / "out"), job.plan.fields, check_prompts(job), 9, 0)
    assert NUM_LAYERS in job.plan.fields["exit.layers"]
