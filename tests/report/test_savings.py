from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from eevp_batch.report.forecast import flops_by_exit, flops_per_token
from eevp_batch.report.savings import Savings, savings
from eevp_batch.spec import ExitSpec
from tests.storage.jobs import MODEL, make_spec

FIELDS = {
    "exit.mode": "on",
    "exit.kv": "propagate",
    "exit.vocab.top_k": 32,
    "exit.vocab.final_head": "full",
    "exit.vocab.prune_layer": 2,
}
LAYERS = [2, 4, 6]


def saved(exits: dict[int, int], prompts: int = 0, model: Any = MODEL, **more: Any) -> Savings:
    fields = FIELDS | {name.replace("_", ".", 1): value for name, value in more.items()}
    return savings(fields, LAYERS, {"exits": Counter(exits)}, prompts, model, 10.0)


def test_the_cost_of_a_token_is_that_of_the_forecast() -> None:
    spec = make_spec("in.parquet", exit=ExitSpec(layers=LAYERS))
    flops = flops_by_exit(MODEL, LAYERS, 2, spec.exit.vocab.top_k, True)
    assert flops_per_token(spec, MODEL) == (flops[2], flops[6])
    assert flops[2] < flops[4] < flops[6]


def test_seconds_go_with_operations() -> None:
    found = saved({2: 100})
    assert found.seconds_saved == pytest.approx(10.0 * (found.flops_full / found.flops_run - 1))
    assert (found.layers_run, found.layers_full) == (200, 600)


def test_checks_that_nobody_passes_cost_and_do_not_save() -> None:
    found = saved({6: 100})
    assert found.flops_run > found.flops_full and found.seconds_saved < 0


def test_without_exits_nothing_is_saved() -> None:
    fields = FIELDS | {"exit.mode": "off", "exit.vocab.prune_layer": None}
    found = savings(fields, [6], {"exits": Counter({6: 100})}, 50, MODEL, 10.0)
    assert found.flops_run == found.flops_full and found.seconds_saved == 0


def test_chunks_at_full_depth_pay_no_check() -> None:
    tokens = {"full": Counter({6: 100})}
    found = savings(FIELDS, LAYERS, tokens, 0, MODEL, None)
    assert found.flops_run == found.flops_full and found.seconds_saved is None


def test_prompts_count_in_both() -> None:
    without, with_prompts = saved({2: 100}), saved({2: 100}, prompts=1000)
    per_token = 2 * MODEL.num_layers * MODEL.layer_weights
    assert with_prompts.flops_full - without.flops_full == 1000 * per_token
    assert with_prompts.flops_run - without.flops_run == 1000 * per_token
    bridged = saved({2: 100}, prompts=1000, exit_prefill="bridge")
    assert bridged.flops_run < with_prompts.flops_run


@pytest.mark.parametrize("policy", ["recompute", "verify"])
def test_layers_that_are_run_later_are_not_called_saved(policy: str) -> None:
    found = saved({2: 100}, exit_kv=policy)
    assert found.flops_run is None and found.seconds_saved is None
    assert policy in found.missing and "later" in found.missing


def test_without_the_model_it_says_so() -> None:
    found = saved({2: 100}, model=None)
    assert found.flops_run is None and "not at hand" in found.missing
    assert replace(found, missing=None).layers_run == 200, "layers are known all the same"
