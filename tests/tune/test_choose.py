"""Exit layers are found on the job's own rows, by costs that are counted or measured."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from eevp_batch.engine import packed_linear
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.model_config import read_model_config
from eevp_batch.spec import ExitSpec, ModelSpec, VocabSpec
from eevp_batch.tune import costs as tune_costs
from eevp_batch.tune.choose import choose_exits
from eevp_batch.tune.costs import for_job, measured_costs
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows, without_layers

CHEAP = Costs(NUM_LAYERS, 1.0, 0.5, 0.2, 0.1, 0.1, 0.02)


@pytest.mark.parametrize("after", [2, 4])
def test_the_layer_after_which_nothing_happens_is_chosen(tiny_llama: Path, after: int) -> None:
    model = without_layers(tiny_llama, after)
    rows = make_rows(tiny_llama, model)
    best = choose_exits(model, rows, CHEAP, most_exits=1)[0]
    assert best.layers == (after,) and best.shares == (1.0,)
    beyond = choose_exits(model, rows, CHEAP, most_exits=1, layers=[5])[0]
    assert beyond.layers == (5,) and beyond.speed < best.speed


def test_counted_costs_are_the_matrices(tiny_llama: Path) -> None:
    config = read_model_config(ModelSpec(path=str(tiny_llama)))
    costs = Costs.counted(config, top_k=4, proposal_rank=8, bridge_rank=4)
    assert costs.layer == 32 * (32 + 32 + 16 + 16) + 3 * 32 * 64
    assert costs.head == 320 * 32
    assert costs.proposal == 8 * (320 + 32) + costs.rescoring
    assert costs.rescoring == 4 * 32 * 20
    assert Costs.counted(config, top_k=4, shortlist=9).proposal == 9 * 32
    of_layer, read_in = 32 * 4, 4 * (2 * 32 + 64) / config.num_layers
    assert costs.bridge == of_layer + read_in, "keys and values: two heads of eight numbers each"
    assert Costs.counted(config, top_k=None).exit_check == costs.head + 32 * 32
    assert Costs.counted(config, mlp_width=5).exit_head == 32 * 32 + 2 * 5 * 32


@pytest.mark.parametrize("top_k", [None, 16])
def test_every_part_takes_time(tiny_llama: Path, top_k: int | None) -> None:
    model = SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])
    costs = measured_costs(
        model, 8, top_k, proposal_rank=8, bridge_rank=4, shortlist=64, mlp_width=5
    )
    assert min(astuple(costs)[:-3]) > 0
    assert (costs.prompts, costs.bridges_prompts) == (0.0, False), "rows say, no clock"
    assert costs.final_k is None, "the job says"


def test_what_all_prompts_begin_with_is_computed_once() -> None:
    rows = [Row([1, 2, 3, 4, 5], [7, 8]), Row([1, 2, 9], [7, 8, 9])]
    bridged = ExitSpec(heads="fitted", kv="bridge", prefill="bridge")
    costs = for_job(CHEAP, bridged, rows)
    assert costs == replace(CHEAP, prompts=4 / 5, bridges_prompts=True)
    assert for_job(CHEAP, ExitSpec(), rows[:1]).prompts == 5 / 2


def test_what_the_last_layer_scores_is_the_job_s_own(tiny_llama: Path) -> None:
    def costs(**vocab: Any) -> Costs:
        return for_job(CHEAP, ExitSpec(vocab=VocabSpec(**vocab)), [Row([1], [2])])

    assert costs(top_k=9, final_head="pruned").final_k == 9
    assert costs(top_k=9).final_k is None and costs(top_k=None, final_head="pruned").final_k is None


def test_no_part_is_a_product_that_this_cpu_does_not_have(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or bridges, measured in bfloat16 where the engine widens them, seem dearer than layers."""
    monkeypatch.setattr(
        packed_linear, "lacks_products", lambda weight: weight.dtype != torch.float32
    )
    model = SegmentedModel(load_model(tiny_llama).to(torch.bfloat16), [NUM_LAYERS])
    multiplied = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.nn.functional.linear, torch.Tensor.matmul, torch.matmul):
                multiplied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        measured_costs(model, 8, 16, bridge_rank=4)
    assert torch.bfloat16 not in multiplied


def test_kept_ids_repeat_as_those_of_text_do() -> None:
    ids = tune_costs._kept_alike(64, 256, 49_152)
    assert 6000 < len(ids.unique()) < 7500 and ids.shape == (64, 256)
    assert int(tune_costs._kept_alike(4, 16, 20).max()) < 20, "a small vocabulary"
