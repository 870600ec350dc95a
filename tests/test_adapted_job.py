"""Jobs whose exits have an adapter: what they are measured by is what the original says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eevp_batch.cli import main
from eevp_batch.cluster.audit import is_audited
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.load import load_engine
from eevp_batch.model_config import ModelConfig, read_model_config
from eevp_batch.prepare import prepare
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import ModelSpec
from tests.engine.conftest import load_model, oracle
from tests.engine.test_adapter import changed
from tests.plain_output import read_rows
from tests.real_jobs import run_in_process
from tests.tiny_models import NUM_LAYERS
from tests.tune.test_fit_command import job_file

SIZE = 0.3  # of a change that makes a model say other things


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def config_of(path: Path) -> ModelConfig:
    return read_model_config(ModelSpec(path=str(path), dtype="float32"))


def adapted_job(folder: Path, model: Path, **exit: Any) -> Path:
    """A job with an adapter that changes what the model says, and with nothing else fitted."""
    adapter = changed(load_model(model), size=SIZE).adapter()
    digest = config_of(model).content_hash
    exits = FittedExits(digest, NUM_LAYERS, 32, (3,), adapter=adapter, facts={"data": {}})
    exits.save(folder / "fitted")
    return job_file(folder, model, **{"heads": "fitted", "vocab": {"top_k": 32}, **exit})


@pytest.mark.parametrize(("dtype", "head"), [("float32", "affine"), ("bfloat16", "mlp")])
def test_a_job_with_a_fitted_adapter_runs(
    tmp_path: Path, tiny_llama: Path, dtype: str, head: str
) -> None:
    job = job_file(tmp_path, tiny_llama, heads="fitted", kv="bridge", prefill="bridge")
    text = job.read_text()
    job.write_text(text.replace("dtype: float32", f"dtype: {dtype}"))
    options = ["--layers", 2, "--proposal-rank", 16, "--rows", 20, "--head", head]
    trained = ["--adapter-rank", 2, "--adapter-steps", 6]
    result = invoke("fit", job, tmp_path / "fitted", *options, *trained)
    assert result.exit_code == 0, result.output
    assert "adapter: done" in result.stderr and "adapter of rank 2: 6 steps in" in result.stdout
    names = {path.name for path in (tmp_path / "fitted").iterdir()}
    assert names == {"fitted.json", "fitted.safetensors"}, "no checkpoint is left"
    manifest = json.loads((tmp_path / "fitted" / "fitted.json").read_text())
    assert manifest["adapter_rank"] == 2
    assert [point["step"] for point in manifest["figures"]["adapter"]["curve"]] == [*range(1, 7)]
    prepared = prepare(str(job))
    engine, encoder = load_engine(prepared.spec, prepared.model)
    found = next(engine.generate([Prompt(0, encoder.encode({"prompt": "the fox number 3"}))]))
    assert isinstance(found, Generation) and found.generated_tokens


def test_the_job_s_full_depth_is_the_adapted_model_s(tmp_path: Path, tiny_llama: Path) -> None:
    prepared = prepare(str(adapted_job(tmp_path, tiny_llama, threshold=2.0)))
    engine, encoder = load_engine(prepared.spec, prepared.model)
    prompt = Prompt(0, encoder.encode({"prompt": "the fox number 3"}))
    found = next(engine.generate([prompt]))
    whole = load_model(tiny_llama)
    settings = {"max_new_tokens": 12}
    assert isinstance(found, Generation)
    assert found.token_ids != oracle(whole, prompt, **settings)
    changed(whole, size=SIZE)
    assert found.token_ids == oracle(whole, prompt, **settings)


def test_a_calibration_compares_with_the_original(tmp_path: Path, tiny_llama: Path) -> None:
    """Without any exit every token is the adapted last layer's, and most are not the original's."""
    job = adapted_job(tmp_path, tiny_llama)
    options = ["--rows", 40, "--settings", 2, "--json"]
    result = invoke("calibrate", job, "--out", tmp_path / "c.json", *options)
    assert result.exit_code == 2 and "not certified" in result.stderr
    never = json.loads(result.stdout)["settings"][0]
    assert never["mean_layer"] == NUM_LAYERS and never["tuning_risk"] > 0.2


@pytest.mark.ray
def test_an_audit_compares_with_the_original(tmp_path: Path, tiny_llama: Path) -> None:
    job = adapted_job(tmp_path, tiny_llama, threshold=2.0)
    run_in_process(job, ["audit.full_depth_fraction=0.5"])
    rows = read_rows(tmp_path / "out")
    audited = {row["row_id"]: row for row in rows if row["audit_token_ids"] is not None}
    assert set(audited) == {n for n in range(40) if is_audited(0, n, 0.5)}
    off = ["exit.mode=off", "exit.heads=null", "output.path=off"]
    run_in_process(job, off)
    original = {row["row_id"]: row["token_ids"] for row in read_rows(tmp_path / "off")}
    for row_id, row in audited.items():
        assert row["audit_token_ids"] == original[row_id]
    assert any(row["audit_token_ids"] != row["token_ids"] for row in audited.values())


def test_what_makes_no_sense_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    job = adapted_job(tmp_path, tiny_llama)
    verified = invoke("validate", job, "--set", "exit.kv=verify")
    assert verified.exit_code == 2 and "exit.kv: found verify beside exit.heads" in verified.stderr
    looked = invoke(
        "potential", tiny_llama, tmp_path / "in.parquet", "--heads", tmp_path / "fitted"
    )
    assert looked.exit_code == 2 and "found an adapter" in looked.stderr
    alone = invoke("fit", job, tmp_path / "out", "--adapter-steps", 3)
    assert alone.exit_code == 2 and "--adapter-steps: found no --adapter-rank" in alone.stderr
    half = invoke("fit", job, tmp_path / "o", "--adapter-rank", 2, "--set", "model.dtype=float16")
    assert half.exit_code == 2 and "model.dtype: found float16" in half.stderr
    for option in (("--adapter-rank", 0), ("--adapter-rank", 2, "--adapter-minutes", 0)):
        assert invoke("fit", job, tmp_path / "out", *option).exit_code == 2


def test_the_adapter_of_another_model_is_refused(
    tmp_path: Path, tiny_llama: Path, tiny_model_path: Any
) -> None:
    job = adapted_job(tmp_path, tiny_llama)
    other = tiny_model_path("llama_tied")
    result = invoke("validate", job, "--set", f"model.path={other}")
    assert result.exit_code == 2 and "found exits fitted for a model with hash" in result.stderr
