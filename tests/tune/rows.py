"""Rows that tiny models made at full depth, and models whose exits are known."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoTokenizer

from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.spec import EngineSpec, SamplingSpec
from eevp_batch.tune.outputs import full_depth_engine, generate_rows
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS


def make_rows(path: Path, model: SegmentedModel, count: int = 60) -> list[Row]:
    """Full-depth generations of random prompts."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 320) for _ in range(rng.randrange(2, 20))] for _ in range(count)]
    engine = full_depth_engine(
        load_model(path),
        model,
        AutoTokenizer.from_pretrained(path),
        SamplingSpec(max_new_tokens=20),
        EngineSpec(max_batch=8),
    )
    return generate_rows(engine, prompts)


def without_layers(path: Path, after: int, save: Path | None = None) -> SegmentedModel:
    """A model whose layers behind `after` add nothing; `save` takes its folder."""
    plain = load_model(path)
    for layer in plain.model.layers[after:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    if save is not None:
        plain.save_pretrained(save)
        AutoTokenizer.from_pretrained(path).save_pretrained(save)
    return SegmentedModel(plain, [NUM_LAYERS])
