"""Training an adapter: exits get better, full depth stays, and a killed training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune import adapter_checkpoint
from eevp_batch.tune.adapted_fit import Adapting, fit_adapted
from eevp_batch.tune.adapter_training import AdapterSettings
from eevp_batch.tune.fit import FitSettings
from eevp_batch.tune.head_training import HeadSettings
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.engine.test_adapter import changed
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows, without_layers

LAYER = 3
FIT = FitSettings([LAYER], heads=HeadSettings(epochs=1, batch=64))
QUICK = AdapterSettings(rank=4, steps=12, checkpoint_steps=5, accumulate=2)


class Job:
    """A tiny model and its rows."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self.path = path
        self.model = SegmentedModel(load_model(path), [NUM_LAYERS])
        self.rows: list[Row] = make_rows(path, self.model, num_rows)

    def adapted(
        self,
        folder: Path,
        settings: AdapterSettings,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> FittedExits:
        adapting = Adapting(settings, lambda: load_model(self.path), folder)
        return fit_adapted(self.model, "abc", self.rows, FIT, adapting, None, on_progress)


@pytest.fixture(scope="module")
def job(tiny_llama: Path) -> Job:
    return Job(tiny_llama, 24)


def killed_after(step: int) -> Callable[[str, int, int], None]:
    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "adapter" and done == step:
            raise KeyboardInterrupt

    return on_progress


def assert_equal(one: FittedExits, other: FittedExits) -> None:
    ours, theirs = one._tensors(), other._tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    curves = [fit.facts["figures"]["adapter"]["curve"] for fit in (one, other)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("step", [5, 8])
def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(
    job: Job, tmp_path: Path, step: int
) -> None:
    whole = job.adapted(tmp_path / "whole", QUICK)
    with pytest.raises(KeyboardInterrupt):
        job.adapted(tmp_path / "killed", QUICK, killed_after(step))
    assert {path.suffix for path in (tmp_path / "killed").iterdir()} == {".json", ".safetensors"}
    seen: list[int] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.extend([done] if stage == "adapter" else [])

    resumed = job.adapted(tmp_path / "killed", QUICK, on_progress)
    assert seen == list(range(5, 13)), "five steps are not done again"
    assert_equal(resumed, whole)


def test_a_checkpoint_of_another_training_is_left_alone(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        job.adapted(tmp_path, QUICK, killed_after(5))
    (name,) = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    seen: list[int] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.extend([done] if stage == "adapter" else [])

    other = AdapterSettings(rank=2, steps=1)
    job.adapted(tmp_path, other, on_progress)
    assert seen == [0, 1]
    name.write_bytes(name.read_bytes()[:-1])
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        job.adapted(tmp_path, QUICK, lambda *at: (on_progress(*at), killed_after(1)(*at))[0])
    assert seen == [0, 1], "damaged, so that it begins anew"
    adapter_checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_minutes_become_steps(job: Job, tmp_path: Path) -> None:
    fit = job.adapted(tmp_path, AdapterSettings(rank=2, minutes=0.02))
    found = fit.facts["figures"]["adapter"]
    assert found["steps"] >= 1 and found["seconds"] < 60
    assert found["curve"][-1]["step"] == found["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_what_was_done_to_a_model_is_undone(
    family: str, tiny_model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """The rows are an undamaged model's, whose layers behind the exit add nothing."""
    path = tmp_path / "known"
    without_layers(tiny_model_path(family), LAYER, path)
    job = Job(path, 60)

    def damaged() -> PreTrainedModel:
        model = load_model(path)
        with torch.no_grad():
            for name, change in changed(load_model(path)).adapter().changes.items():
                weight = model.get_submodule(name).weight
                weight.copy_(change.added_to(weight))
        return model

    def fitted(settings: AdapterSettings, name: str) -> dict[str, Any]:
        adapting = Adapting(settings, damaged, tmp_path / name)
        found = fit_adapted(job.model, "abc", job.rows, FIT, adapting)
        return dict(found.facts["figures"])

    before = fitted(AdapterSettings(rank=8, steps=1, learning_rate=1e-9), "before")
    after = fitted(AdapterSettings(rank=8, steps=100, learning_rate=1e-2), "after")

    layer, kept = str(LAYER), "full_depth_agreement"
    assert after["adapter"][kept] - before["adapter"][kept] > 0.1, "of rows that it did not see"
    assert after["heads"][layer]["agreement"] - before["heads"][layer]["agreement"] > 0.1
    first, last = after["adapter"]["curve"][0], after["adapter"]["curve"][-1]
    assert last["loss"] < 0.1 * first["loss"]
    assert last["layers"][layer] < 0.1 * first["layers"][layer]
