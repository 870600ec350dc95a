"""States by layer are those of the engine and of transformers, whatever shares a pass."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.fused import FusedLayers
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.tune.states import Row, forced_passes
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS


def random_rows(count: int = 12) -> list[Row]:
    rng = random.Random(3)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, 320) for _ in range(length)]

    rows = [Row(ids(rng.randrange(1, 30)), ids(rng.randrange(1, 20))) for _ in range(count)]
    return [Row(ids(1), ids(1)), *rows]  # one that feeds a single token


@pytest.mark.parametrize("pass_tokens", [1, 100, 2048])
def test_states_are_those_of_transformers(any_tiny_model: Path, pass_tokens: int) -> None:
    rows = random_rows()
    plain = load_model(any_tiny_model, attn_implementation="eager")
    model = SegmentedModel(load_model(any_tiny_model), [NUM_LAYERS])
    seen = []
    for forced in forced_passes(model, rows, pass_tokens):
        layers = dict(forced.layers())
        assert list(layers) == list(range(1, NUM_LAYERS + 1))
        start = 0
        for number, row in zip(forced.row_numbers, forced.rows, strict=True):
            ids = torch.tensor([row.fed_ids])
            with torch.no_grad():
                expected = plain(ids, output_hidden_states=True).hidden_states
            stop = start + len(row.fed_ids)
            for layer in range(1, NUM_LAYERS):  # the last one comes normed from transformers
                torch.testing.assert_close(
                    layers[layer][start:stop], expected[layer][0], atol=1e-3, rtol=1e-3
                )
            assert rows[number] is row
            seen.append(number)
            start = stop
    assert sorted(seen) == list(range(len(rows))), "every row is in one pass"


def test_positions_are_labelled_by_what_they_hold_and_by_what_follows(tiny_llama: Path) -> None:
    rows = random_rows()
    model = SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])
    for forced in forced_passes(model, rows, 64):
        fed = [token_id for row in forced.rows for token_id in row.fed_ids]
        prompts = [token_id for row in forced.rows for token_id in row.prompt_ids]
        generated = [token_id for row in forced.rows for token_id in row.generated_ids[:-1]]
        following = [token_id for row in forced.rows for token_id in row.generated_ids]
        before = [
            token_id
            for row in forced.rows
            for token_id in [row.prompt_ids[-1], *row.generated_ids[:-1]]
        ]
        assert [fed[at] for at in forced.prompt] == prompts
        assert [fed[at] for at in forced.generated] == generated
        assert [fed[at] for at in forced.deciding] == before
        assert forced.next_ids.tolist() == following
        lengths = {n: forced.owners.tolist().count(n) for n in forced.row_numbers}
        assert lengths == {n: len(rows[n].generated_ids) for n in forced.row_numbers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_keys_and_values_are_the_layers_own(
    any_tiny_model: Path, dtype: torch.dtype
) -> None:
    plain = load_model(any_tiny_model).to(dtype)
    model = SegmentedModel(load_model(any_tiny_model).to(dtype), [NUM_LAYERS])
    assert isinstance(model.layers, FusedLayers) == (dtype == torch.float32), "both are tested"
    hidden = torch.randn(5, model.hidden_size, dtype=dtype)
    for index, layer in enumerate(plain.model.layers):
        with torch.no_grad():
            normed = layer.input_layernorm(hidden)
            key, value = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
            found = model.layers.kv_of(index, hidden.clone())
        torch.testing.assert_close(found, torch.cat([key, value], -1), atol=1e-4, rtol=1e-4)


def test_no_rows_no_pass(tiny_llama: Path) -> None:
    model = SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])
    assert list(forced_passes(model, [])) == []
