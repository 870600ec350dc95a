"""What the engine's tests share: engines over tiny models, prompts, and the oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.devices import Device
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec, VocabSpec

NEW_TOKENS = 20
needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="8-bit products are not exact here: no VNNI"
)

# Tiny products gain nothing from a second thread and lose much when the other core is busy.
torch.set_num_threads(1)


def load_model(path: Path, **changes: Any) -> PreTrainedModel:
    """The float32 model of a folder, with transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **changes)
    return model.eval()


def make_engine(
    path: Path,
    *,
    layers: list[int] | None = None,
    threshold: float | list[float] = 0.3,
    top_k: int | None = 32,
    max_batch: int = 5,
    sampling: SamplingSpec | None = None,
    model: PreTrainedModel | None = None,
    limits: dict[str, Any] | None = None,
    vocab: dict[str, Any] | None = None,
    kernel: Kernel | None = None,
    devices: Sequence[Device] = (),
    **exit: Any,
) -> Engine:
    """An engine over a tiny model; without `layers` the exits are off."""
    if layers is None:
        exits = ExitSpec(mode="off")
    else:
        cut = VocabSpec(top_k=top_k, **(vocab or {}))
        exits = ExitSpec(layers=layers, threshold=threshold, vocab=cut, **exit)
    return build_engine(
        model or load_model(path),
        AutoTokenizer.from_pretrained(path),
        exits,
        sampling or SamplingSpec(max_new_tokens=NEW_TOKENS),
        EngineSpec(max_batch=max_batch, **(limits or {"max_resident": 3 * max_batch})),
        kernel=kernel,
        devices=devices,
    )


def run(engine: Engine, prompts: list[Prompt]) -> dict[tuple[Any, int], Generation]:
    """All generations by (row id, sample index); asserts that nothing failed and nothing leaked."""
    out = {}
    for result in engine.generate(prompts):
        assert isinstance(result, Generation), f"no row may fail here: {result}"
        out[result.row_id, result.sample_index] = result
    assert engine.pool.is_empty and engine.is_idle, "after a run nothing is held"
    assert len(out) == len(prompts), "each prompt comes out once"
    return out


def oracle(model: PreTrainedModel, prompt: Prompt, **settings: Any) -> list[int]:
    """What plain transformers greedy generation gives."""
    ids = torch.tensor([prompt.token_ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        **{"max_new_tokens": NEW_TOKENS, **settings},
    )
    return out[0, ids.shape[1] :].tolist()


@cache
def plain(path: Path) -> PreTrainedModel:
    """The model that engines are compared with; nobody changes it."""
    return load_model(path)


@cache
def _greedy(path: Path, token_ids: tuple[int, ...]) -> list[int]:
    return oracle(plain(path), Prompt(0, list(token_ids)))


def greedy(path: Path, prompt: Prompt) -> list[int]:
    """The oracle of a folder's model; asked for the same again it remembers."""
    return list(_greedy(path, tuple(prompt.token_ids)))


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """24 random prompts of 1 to 40 tokens."""
    rng = random.Random(7)
    lengths = [1, 2, 16, 17, *(rng.randrange(1, 41) for _ in range(20))]
    return [
        Prompt(row_id=row, token_ids=[rng.randrange(3, 320) for _ in range(length)])
        for row, length in enumerate(lengths)
    ]
