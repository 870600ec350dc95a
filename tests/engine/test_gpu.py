"""The engine's first rules again, on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from eevp_batch.records import Prompt
from tests.engine.conftest import load_model, make_engine, oracle, run

pytestmark = pytest.mark.gpu


def test_exits_off_equals_greedy_on_the_device(any_tiny_model: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(any_tiny_model, model=load_model(any_tiny_model).cuda())
    found = run(engine, prompts)
    model = load_model(any_tiny_model)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == oracle(model, prompt)


def test_exits_give_on_the_device_what_they_give_on_the_cpu(
    any_tiny_model: Path, prompts: list[Prompt]
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.35}
    host = run(make_engine(any_tiny_model, **settings), prompts)
    on_device = load_model(any_tiny_model).cuda()
    device = run(make_engine(any_tiny_model, model=on_device, **settings), prompts)
    for key, generation in host.items():
        assert device[key].token_ids == generation.token_ids
        assert device[key].exit_layers == generation.exit_layers
