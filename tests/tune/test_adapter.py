"""Training an adapter: exits get better, full depth stays, and a killed training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune import adapter_checkpoint
from eevp_batch.tune.adapted_fit import Adapting, fit_adapted
from eevp_batch.tune.adapter_training import AdapterSettings
from eevp_batch.tune.fit import FitSettings, fit_exits
from eevp_batch.tune.head_training import HeadSettings
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows

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
def test_a_middle_layer_learns_what_the_last_one_says(
    family: str, tiny_model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    job = Job(tiny_model_path(family), 160)
    frozen = fit_exits(job.model, "abc", job.rows, FIT).facts["figures"]["heads"][str(LAYER)]
    settings = AdapterSettings(rank=8, steps=200, learning_rate=1e-2, head_learning_rate=1e-3)
    figures = job.adapted(tmp_path, settings).facts["figures"]
    found, adapter = figures["heads"][str(LAYER)], figures["adapter"]
    assert found["agreement"] > frozen["agreement"] + 0.03, "on rows that it did not see"
    assert found["share_leaving_of_all"]["0.95"] > frozen["share_leaving_of_all"]["0.95"]
    assert adapter["full_depth_agreement"] > 0.9
    first, last = adapter["curve"][0], adapter["curve"][-1]
    assert last["layers"][str(LAYER)] < 0.8 * first["layers"][str(LAYER)]
