"""`eevp-batch fit`: from a job to a folder of fitted exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from eevp_batch.cli import main
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.tune import command
from eevp_batch.tune.choose import choose_exits
from eevp_batch.tune.search import Costs, ExitChoice
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import without_layers


def job_file(folder: Path, model: Path, **exit: Any) -> Path:
    """A job over 40 prompts; its input is written beside it."""
    texts = [f"the fox number {row}" for row in range(40)]
    pq.write_table(pa.table({"id": range(40), "prompt": texts}), folder / "in.parquet")
    job = {
        "input": {"path": "in.parquet"},
        "model": {"path": str(model), "dtype": "float32"},
        "exit": exit,
        "sampling": {"max_new_tokens": 12},
        "output": {"path": "out"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def fit(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["fit", *map(str, arguments)])


def test_named_layers_are_fitted(tmp_path: Path, tiny_llama: Path) -> None:
    """The job already says what it will use; that it is not there yet does not matter."""
    job = job_file(tmp_path, tiny_llama, heads="fitted", kv="bridge", prefill="bridge")
    options = ["--layers", "2,4", "--bridge-rank", 8, "--proposal-rank", 16, "--tail", 2]
    result = fit(job, tmp_path / "fitted", *options, "--rows", 20)
    assert result.exit_code == 0, result.output
    assert "head after layer 2" in result.stdout and "bridge of prompt tokens" in result.stdout
    assert "generating for 20 prompts" in result.stderr
    assert "head after layer 4: done" in result.stderr
    found = FittedExits.load(tmp_path / "fitted")
    assert (found.exit_layers, found.tail) == ((2, 4), 2)
    assert found.proposal is not None
    data = found.facts["data"]
    assert (data["input"], data["from"]) == ("../in.parquet", None), "both may be moved"
    down = found.bridges["generated", 2].down
    assert down is not None and down.shape == (8, 4 * 32), "state, the one before, lifted ones"
    valid = CliRunner().invoke(main, ["validate", str(job)])
    assert valid.exit_code == 0, valid.output


def test_heads_are_of_the_kind_that_is_asked_for(tmp_path: Path, tiny_llama: Path) -> None:
    job, options = job_file(tmp_path, tiny_llama), ["--layers", "3", "--rows", 20, "--json"]
    for chosen, width in (
        ([], None),
        (["--head", "mlp"], 8),
        (["--head", "mlp", "--head-width", 5], 5),
    ):
        result = fit(job, tmp_path / "fitted", *options, *chosen)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["settings"]["heads"]["mlp_width"] == width


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["--head-width", 5], "--head-width: found --head affine; allowed: --head mlp"),
        (["--head", "mlp", "--head-width", 0], "0 is not in the range x>=1"),
        (["--head", "tree"], "'tree' is not one of 'affine', 'mlp'"),
    ],
)
def test_heads_that_cannot_be(
    tmp_path: Path, tiny_llama: Path, chosen: list[object], said: str
) -> None:
    result = fit(job_file(tmp_path, tiny_llama), tmp_path / "fitted", *chosen)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert "--head" in result.stderr


def test_layers_are_searched(tmp_path: Path, tiny_llama: Path) -> None:
    """Whether one before the perfect one pays as well depends on how long things take here."""
    done = without_layers(tiny_llama, after=2, save=tmp_path / "model")
    assert done.num_layers == NUM_LAYERS
    result = fit(job_file(tmp_path, tmp_path / "model"), tmp_path / "fitted", "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert set(manifest["exit_layers"]) in ({1}, {2}, {1, 2}), "none lies behind it"
    assert manifest["data"]["search"]["layers"] == manifest["exit_layers"]


def test_layers_are_searched_for_what_the_job_will_use(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def remember(model: Any, rows: Any, costs: Costs, *rest: Any) -> list[ExitChoice]:
        asked.append(costs)
        return choose_exits(model, rows, costs, *rest)

    monkeypatch.setattr(command, "choose_exits", remember)
    without_layers(tiny_llama, after=2, save=tmp_path / "model")
    exit = {"heads": "fitted", "kv": "bridge", "prefill": "bridge", "vocab": {"top_k": 16}}
    exit["vocab"]["final_head"] = "pruned"  # type: ignore[index]
    job = job_file(tmp_path, tmp_path / "model", **exit)
    for changes, expected in (([], (True, 16)), (["exit.prefill=full"], (False, 16))):
        more = [part for change in changes for part in ("--set", change)]
        result = fit(job, tmp_path / "fitted", "--target", 0.8, *more)
        assert result.exit_code == 0, result.output
        assert (asked[-1].bridges_prompts, asked[-1].final_k) == expected


@pytest.mark.parametrize("layers", ["2;4", "a", "2,,4"])
def test_layers_that_are_no_numbers(tmp_path: Path, tiny_llama: Path, layers: str) -> None:
    result = fit(job_file(tmp_path, tiny_llama), tmp_path / "fitted", "--layers", layers)
    assert result.exit_code == 2 and "--layers: found" in result.stderr


def test_a_job_that_samples_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    job = job_file(tmp_path, tiny_llama)
    result = fit(job, tmp_path / "fitted", "--set", "sampling.temperature=0.7")
    assert result.exit_code == 2 and "temperature" in result.stderr
