"""What exits could do: figures of models whose exits are known, and the command around them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from eevp_batch.cli import main
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import InputError
from eevp_batch.model_config import read_model_config
from eevp_batch.spec import InputSpec, ModelSpec, PromptSpec
from eevp_batch.tune.fit import FitSettings, fit_exits
from eevp_batch.tune.head_training import HeadSettings
from eevp_batch.tune.potential import measure_potential
from eevp_batch.tune.sample import sample_prompts
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row
from eevp_batch.tune.survey import quick_heads, survey
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows, without_layers

CHEAP = Costs(NUM_LAYERS, 1.0, 0.5, 0.2, 0.1, 0.1, 0.02)
EARLY = range(1, NUM_LAYERS)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> SegmentedModel:
    return SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, model: SegmentedModel) -> list[Row]:
    return make_rows(tiny_llama, model, count=30)


def test_a_survey_is_what_transformers_says(
    tiny_llama: Path, model: SegmentedModel, rows: list[Row]
) -> None:
    views = survey(model, rows, [2, 4])
    plain = load_model(tiny_llama)
    agrees, ranks = {2: 0, 4: 0}, {2: 0, 4: 0}
    for row in rows:
        with torch.no_grad():
            states = plain(torch.tensor([row.fed_ids]), output_hidden_states=True).hidden_states
        best = torch.tensor(row.generated_ids)
        for layer in (2, 4):
            deciding = states[layer][0, len(row.prompt_ids) - 1 :]
            scores = plain.lm_head(plain.model.norm(deciding))
            agrees[layer] += int((scores.argmax(-1) == best).sum())
            ranks[layer] += int((scores > scores.gather(1, best[:, None])).sum())
    for layer in (2, 4):
        assert int(views[layer].agrees.sum()) == agrees[layer]
        assert int(views[layer].ranks.sum()) == pytest.approx(ranks[layer], rel=1e-3)
        assert views[layer].recall(1) == views[layer].agreement
        assert views[layer].recall(320) == 1.0


def test_a_model_that_is_done_early_is_found_out(tiny_llama: Path) -> None:
    done = without_layers(tiny_llama, after=2)
    rows = make_rows(tiny_llama, done, count=30)
    found = measure_potential(done, rows, {"raw": {}}, CHEAP)
    lens = found.lenses[0]
    assert [figures.layer for figures in lens.layers] == list(EARLY)
    for figures in lens.layers[1:]:
        assert figures.agreement == figures.leaving == figures.recall[64] == 1.0
    assert max(lens.earliest) == 2 and sum(lens.earliest.values()) == found.tokens
    assert 1 - 2 / NUM_LAYERS <= lens.oracle_saving < 1
    assert lens.best.layers == (2,)
    assert found.verdict.startswith("Exits can pay (as the model stands): 100% of the tokens")


def test_a_model_that_needs_its_layers_is_told_so(model: SegmentedModel, rows: list[Row]) -> None:
    dear = Costs(NUM_LAYERS, 1.0, 8.0, 8.0, 0.5, 0.1, 0.05)
    found = measure_potential(model, rows, {"raw": {}}, dear)
    assert found.lenses[0].best.layers == ()
    assert found.verdict.startswith("Exits will not pay (as the model stands)")
    assert "8.1 layers" in found.verdict and "may change that" in found.verdict


def test_quick_heads_read_more_than_the_raw_state(model: SegmentedModel, rows: list[Row]) -> None:
    heads = quick_heads(model, rows[:24], rows[24:], [4])
    raw = survey(model, rows[:24], [4])[4].agreement
    assert survey(model, rows[:24], [4], heads)[4].agreement > raw


def write_prompts(path: Path, count: int, start: int = 0) -> None:
    texts = [f"the fox number {start + row}" for row in range(count)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 40, 99])
def test_rows_are_spread_over_all_files(tmp_path: Path, tiny_llama: Path, num_rows: int) -> None:
    write_prompts(tmp_path / "a.parquet", 30)
    write_prompts(tmp_path / "b.parquet", 10, start=30)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    source = InputSpec(path="x", prompt_column="text")
    encoder = PromptEncoder(tokenizer, PromptSpec(chat=False), source, 100)
    found = [tokenizer.decode(ids) for ids in sample_prompts(str(tmp_path), encoder, num_rows)]
    numbers = [int(text.split()[-1]) for text in found]
    assert len(numbers) == min(num_rows, 40)
    assert numbers == sorted(set(numbers)), "in order, each once"
    if 16 <= num_rows <= 40:
        assert numbers[0] < 3 and numbers[-1] >= 36 and sum(n >= 30 for n in numbers) >= 3
    with pytest.raises(InputError, match="no column 'prompt'"):
        wrong = PromptEncoder(tokenizer, PromptSpec(chat=False), None, 100)
        sample_prompts(str(tmp_path), wrong, 3)


def run(*arguments: object, command: str = "potential") -> Result:
    return CliRunner().invoke(main, [command, *map(str, arguments)])


@pytest.fixture
def command(tmp_path: Path, tiny_llama: Path) -> list[object]:
    """Arguments of a quick run."""
    write_prompts(tmp_path / "in.parquet", 20)
    options = ["--column", "text", "--rows", 12, "--max-new-tokens", 8, "--dtype", "float32"]
    return [tiny_llama, tmp_path / "in.parquet", *options]


def test_the_command_prints_tables_and_a_verdict(command: list[object], tmp_path: Path) -> None:
    result = run(*command, "--quick-heads", "--plot", tmp_path / "out.svg")
    assert result.exit_code == 0, result.output
    assert "raw states" in result.stdout and "quick heads" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Exits ")
    assert "generating for 12 prompts" in result.stderr
    drawing = ElementTree.parse(tmp_path / "out.svg").getroot()
    assert len(drawing.findall("{*}polyline")) == 7


def test_the_command_takes_fitted_heads(
    command: list[object], tmp_path: Path, tiny_llama: Path, model: SegmentedModel, rows: list[Row]
) -> None:
    model_hash = read_model_config(ModelSpec(path=str(tiny_llama))).content_hash
    settings = FitSettings([2, 4], heads=HeadSettings(epochs=1))
    fit_exits(model, model_hash, rows, settings).save(tmp_path / "fitted")
    result = run(*command, "--heads", tmp_path / "fitted", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [lens["name"] for lens in found["lenses"]] == ["raw", "fitted"]
    assert [layer["layer"] for layer in found["lenses"][1]["layers"]] == [2, 4]
    fit_exits(model, "another", rows, settings).save(tmp_path / "fitted")
    result = run(*command, "--heads", tmp_path / "fitted")
    assert result.exit_code == 2 and "found another" in result.stderr


def test_the_command_fits_named_layers(command: list[object], tmp_path: Path) -> None:
    options = ["--layers", "2,4", "--bridge-rank", 8, "--proposal-rank", 16]
    result = run(*command, tmp_path / "fitted", *options, command="fit")
    assert result.exit_code == 0, result.output
    assert "head after layer 2" in result.stdout and "bridge of prompt tokens" in result.stdout
    assert "head after layer 4: done" in result.stderr
    found = FittedExits.load(tmp_path / "fitted")
    assert found.exit_layers == (2, 4) and found.proposal is not None
    down = found.bridges["generated", 2].down
    assert down is not None and down.shape == (8, 32)


def test_the_command_searches_layers(tmp_path: Path, tiny_llama: Path) -> None:
    done = without_layers(tiny_llama, after=2, save=tmp_path / "model")
    assert done.num_layers == NUM_LAYERS
    write_prompts(tmp_path / "in.parquet", 40)
    options = ["--column", "text", "--rows", 40, "--max-new-tokens", 12, "--dtype", "float32"]
    source = [tmp_path / "model", tmp_path / "in.parquet", *options]
    result = run(*source, tmp_path / "fitted", "--json", command="fit")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["exit_layers"][0] >= 2
    assert manifest["data"]["search"]["layers"] == manifest["exit_layers"]


@pytest.mark.parametrize("layers", ["2;4", "a", "2,,4"])
def test_layers_that_are_no_numbers(command: list[object], tmp_path: Path, layers: str) -> None:
    result = run(*command, tmp_path / "fitted", "--layers", layers, command="fit")
    assert result.exit_code == 2 and "--layers: found" in result.stderr
