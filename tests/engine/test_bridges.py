"""The KV policy `bridge`: fitted maps in place of the skipped layers' projections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import Affine, Bridge, FittedExits, unit_state
from eevp_batch.engine.load import build_engine
from eevp_batch.engine.packing import pack
from eevp_batch.engine.proposals import LowRankFit
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind, ShortPrompt
from eevp_batch.engine.sequence import Sequence as Generating
from eevp_batch.errors import FittedExitsError
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from tests.engine.conftest import NEW_TOKENS, greedy, load_model, make_engine, run
from tests.engine.test_exit_heads import random_head
from tests.tiny_models import FAMILIES, NUM_LAYERS

LAYERS = [2, 4]


def own_projections(model: PreTrainedModel, exit_layer: int) -> Bridge:
    """The bridge that is the layers' own norm and projections: what `propagate` computes."""
    layers: dict[int, Affine] = {}
    for number, layer in enumerate(model.model.layers, start=1):
        if number <= exit_layer:
            continue
        parts = [layer.self_attn.k_proj, layer.self_attn.v_proj]
        weight = torch.cat([part.weight for part in parts]).detach()
        bias = torch.zeros(len(weight))
        if parts[0].bias is not None:
            bias = torch.cat([part.bias for part in parts]).detach()
        layers[number] = Affine(weight * layer.input_layernorm.weight.detach(), bias)
    return Bridge(layers)


def random_bridge(
    model: PreTrainedModel, exit_layer: int, rank: int | None = None, lift: int = 0
) -> Bridge:
    config = model.config
    width = 2 * config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    generator = torch.Generator().manual_seed(exit_layer)
    num_inputs = 2 * config.hidden_size + lift if lift else config.hidden_size
    size = rank or num_inputs

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {
        layer: Affine(draw(width, size), draw(width))
        for layer in range(exit_layer + 1, NUM_LAYERS + 1)
    }
    down = None if rank is None else draw(rank, num_inputs)
    return Bridge(layers, down, draw(lift, config.hidden_size) if lift else None)


def fitted_for(
    model: PreTrainedModel, bridges: dict[tuple[Kind, int], Bridge], **changes: Any
) -> FittedExits:
    fields: dict[str, Any] = {
        "model_hash": "",
        "num_layers": NUM_LAYERS,
        "hidden_size": model.config.hidden_size,
        "exit_layers": tuple(LAYERS),
        "bridges": bridges,
    }
    return FittedExits(**{**fields, **changes})


def bridged_engine(
    path: Path,
    fitted: FittedExits,
    *,
    max_batch: int = 5,
    limits: dict[str, Any] | None = None,
    threshold: float = 0.3,
    kernel: Kernel | None = None,
    **exit: Any,
) -> Engine:
    vocab = exit.pop("vocab", VocabSpec(top_k=32))
    settings: dict[str, Any] = {"kv": "bridge", "heads": "given", **exit}
    return build_engine(
        load_model(path),
        AutoTokenizer.from_pretrained(path),
        ExitSpec(layers=LAYERS, threshold=threshold, vocab=vocab, **settings),
        SamplingSpec(max_new_tokens=NEW_TOKENS),
        EngineSpec(max_batch=max_batch, **(limits or {"max_resident": 3 * max_batch})),
        fitted,
        kernel,
    )


def exits_of(found: dict[Any, Generation]) -> dict[Any, list[tuple[int, int]]]:
    return {
        row: [(e.token_id, e.exit_layer) for e in generation.exits]
        for row, generation in found.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_of_the_layers_own_projections_is_propagate(
    family: str, tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    path = tiny_model_path(family)
    model = load_model(path)
    bridges: dict[tuple[Kind, int], Bridge] = {
        ("generated", layer): own_projections(model, layer) for layer in LAYERS
    }
    found = run(bridged_engine(path, fitted_for(model, bridges)), prompts)
    expected = run(make_engine(path, layers=LAYERS), prompts)
    assert exits_of(found) == exits_of(expected)
    layers = {layer for row in exits_of(found).values() for _, layer in row}
    assert layers == {*LAYERS, NUM_LAYERS}, "tokens leave everywhere, or nothing is shown"


def with_prompts(
    model: PreTrainedModel, tail: int = 3, lift: int = 6, **changes: Any
) -> FittedExits:
    """Bridges of every form; with a lift, all but one look at the token before."""
    bridges: dict[tuple[Kind, int], Bridge] = {
        ("generated", 2): random_bridge(model, 2, lift=lift),
        ("generated", 4): random_bridge(model, 4, rank=5),
        ("prompt", 2): random_bridge(model, 2, rank=7, lift=lift),
    }
    return fitted_for(model, bridges, tail=tail, **changes)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("prefill", ["full", "bridge"])
def test_a_row_depends_on_the_row_alone(
    family: str, prefill: str, tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    path = tiny_model_path(family)
    fitted = with_prompts(load_model(path))
    expected = exits_of(run(bridged_engine(path, fitted, prefill=prefill), prompts))
    alone: dict[Any, Any] = {}
    for prompt in prompts[:6]:
        alone |= exits_of(run(bridged_engine(path, fitted, prefill=prefill, max_batch=1), [prompt]))
    assert alone == {row: expected[row] for row in alone}
    reverse = run(bridged_engine(path, fitted, prefill=prefill, max_batch=3), prompts[::-1])
    assert exits_of(reverse) == expected


@pytest.mark.parametrize("lead", [0, 37])
@pytest.mark.parametrize("prefill", ["full", "bridge"])
def test_sharing_a_prefix_changes_nothing(prefill: str, lead: int, tiny_model_path: Any) -> None:
    path = tiny_model_path("llama")
    fitted = with_prompts(load_model(path), lead=lead)
    shared = list(range(5, 105))
    rows = [
        Prompt(row_id=row, token_ids=[*shared, *range(200, 200 + row % 7)]) for row in range(12)
    ]
    outputs = []
    for prefix_sharing in (True, False):
        limits = {"prefix_sharing": prefix_sharing, "max_resident": 15}
        engine = bridged_engine(path, fitted, prefill=prefill, limits=limits)
        outputs.append(exits_of(run(engine, rows)))
        assert bool(engine.stats.shared_tokens) is prefix_sharing
    assert outputs[0] == outputs[1]


def test_two_cuts_of_the_same_layers_have_bridges_and_heads_of_their_own(
    tiny_llama: Path, prompts: list[Prompt]
) -> None:
    model = load_model(tiny_llama)
    width = model.config.hidden_size
    bridges = {("generated", layer): random_bridge(model, layer) for layer in LAYERS}
    heads = {layer: random_head(width) for layer in LAYERS}
    fitted = fitted_for(model, bridges, heads=heads)  # type: ignore[arg-type]
    base = SegmentedModel(load_model(tiny_llama), [NUM_LAYERS])
    plain = ExitSpec(layers=LAYERS, threshold=0.3, vocab=VocabSpec(top_k=32))
    bridged = plain.model_copy(update={"kv": "bridge", "heads": "given"})
    settings = {"plain": (plain, None), "bridged": (bridged, fitted)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def engine_of(name: str, cut: SegmentedModel | None) -> Engine:
        exit, of = settings[name]
        sampling, limits = SamplingSpec(max_new_tokens=NEW_TOKENS), EngineSpec(max_batch=5)
        own = load_model(tiny_llama) if cut is None else model
        return build_engine(own, tokenizer, exit, sampling, limits, of, cut=cut)

    expected = {name: exits_of(run(engine_of(name, None), prompts)) for name in settings}
    assert expected["plain"] != expected["bridged"]
    first = engine_of("bridged", base)
    together = {"plain": engine_of("plain", first.model), "bridged": first}
    for name in (*together, *together):  # in turns
        assert exits_of(run(together[name], prompts)) == expected[name], name


@pytest.mark.parametrize("layers", [[2], [2, 4]])
def test_a_bridge_that_looks_back_sees_the_token_before(
    layers: list[int], tiny_model_path: Any
) -> None:
    """Keys of one token are those of the state before it, whatever ran deeper in between.

    The state, not what the exit's head makes of it.
    """
    path = tiny_model_path("llama")
    model = SegmentedModel(load_model(path), [*layers, NUM_LAYERS])
    width, size = model.hidden_size, 2 * model.num_kv_heads * model.head_size
    weight = torch.zeros(size, 2 * width + 1)
    weight[: min(size, width), width : 2 * width] = torch.eye(width)[: min(size, width)]
    maps = {n: Affine(weight, torch.zeros(size)) for n in range(3, NUM_LAYERS + 1)}
    bridge = Bridge(maps, None, torch.zeros(1, width))
    heads = {2: random_head(width)}
    model.use(fitted_for(load_model(path), {("prompt", 2): bridge}, heads=heads))
    pool = model.make_pool(num_pages=4, max_resident=1, max_pages=4)
    short = ShortPrompt(2, tail=1, lead=5)
    row = Generating(Prompt("", list(range(40, 60))), model.num_segments, 1, 0, short_prompt=short)
    pool.admit(row, row.num_prompt, [])
    pool.grow(row)
    first = None
    for depth in range(model.num_segments):
        tokens = pack([row], depth, pool, model.layers.padding)
        model.run_segment(depth, tokens, pool)
        row.mark_filled(depth)
        first = pool.hidden.clone() if first is None else first
    assert first is not None
    slots = torch.tensor([pool.slot(row, position) for position in range(20)])
    values = pool.tokens(NUM_LAYERS - 1, slots)[1].flatten(1)  # [20, size / 2], not turned
    expected = unit_state(first[slots], model.norm_eps) @ weight[size // 2 :, width : 2 * width].T
    assert not values[5].any(), "where the bridged part begins nothing is before"
    torch.testing.assert_close(values[6:19], expected[5:18])


def test_a_short_prompt_computes_less(tiny_model_path: Any) -> None:
    path = tiny_model_path("llama")
    fitted = with_prompts(load_model(path), tail=1)
    rows = [Prompt(row_id=row, token_ids=list(range(20, 60))) for row in range(4)]
    limits = {"prefix_sharing": False, "max_resident": 15}
    packed = {}
    for prefill in ("full", "bridge"):
        engine = bridged_engine(path, fitted, prefill=prefill, limits=limits, threshold=1.5)
        run(engine, rows)
        packed[prefill] = engine.stats.packed_tokens
    assert packed["full"] - packed["bridge"] == 4 * 39 * 2, "39 tokens of 4 rows in 2 segments"


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2"])
def test_above_any_confidence_the_output_is_plain_greedy(
    family: str, tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    path = tiny_model_path(family)
    fitted = with_prompts(load_model(path))
    found = run(bridged_engine(path, fitted, threshold=1.5), prompts)
    for prompt in prompts:
        ids = [exit.token_id for exit in found[prompt.row_id, 0].exits]
        assert ids == greedy(path, prompt)[: len(ids)]


def test_heads_of_zeros_are_the_logit_lens(tiny_model_path: Any, prompts: list[Prompt]) -> None:
    path = tiny_model_path("llama")
    model = load_model(path)
    width = model.config.hidden_size
    zeros = Affine(torch.zeros(width, width), torch.zeros(width))
    fitted = fitted_for(model, {}, heads=dict.fromkeys(LAYERS, zeros))
    found = run(bridged_engine(path, fitted, kv="propagate"), prompts)
    assert exits_of(found) == exits_of(run(make_engine(path, layers=LAYERS), prompts))


def test_a_head_decides_what_leaves(tiny_model_path: Any, prompts: list[Prompt]) -> None:
    """A head whose state is one fixed direction makes every token leave as the same id."""
    path = tiny_model_path("llama")
    model = load_model(path)
    width = model.config.hidden_size
    goal = model.lm_head.weight[77].detach() / model.model.norm.weight.detach()
    head = Affine(-torch.eye(width), 1000 * goal)
    fitted = fitted_for(model, {}, heads={2: head})
    engine = bridged_engine(path, fitted, kv="propagate", threshold=0.0)
    ids = {exit.token_id for row in run(engine, prompts).values() for exit in row.exits}
    scores = model.lm_head(model.model.norm(goal[None]))[0]
    assert ids == {int(scores.argmax())}


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_fitted_proposal_is_taken(
    is_whole: bool, tiny_model_path: Any, prompts: list[Prompt]
) -> None:
    """Factors that are the head itself propose what the head would; nonsense does not.

    The larger one is made from the head, or comes with the folder as it once did.
    """
    path = tiny_model_path("llama")
    model = load_model(path)
    width = model.config.hidden_size
    weight, unit = model.lm_head.weight.detach(), torch.eye(width)
    vocab = VocabSpec(top_k=8, proposal="low_rank")
    expected = exits_of(run(make_engine(path, layers=LAYERS, top_k=8), prompts))
    outputs = []
    for sign in (1, -1):
        factors = LowRankFit(unit, sign * (weight if is_whole else unit), is_whole)
        fitted = fitted_for(model, {}, proposal=factors)
        engine = bridged_engine(path, fitted, kv="propagate", vocab=vocab)
        outputs.append(exits_of(run(engine, prompts)))
    assert outputs[0] == expected
    assert outputs[1] != expected


REFUSED: Sequence[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"exit_layers": (3,)}, {}, "exit.layers: found .2, 4."),
    ({"num_layers": 9}, {}, "found exits of a model with 9 layers"),
    ({"bridges": {}}, {}, "no bridge for generated tokens at layer 2"),
    ({}, {"prefill": "bridge"}, "no bridge for prompt tokens at layer 2"),
]


@pytest.mark.parametrize(("changes", "exit", "message"), REFUSED)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], exit: dict[str, Any], message: str, tiny_model_path: Any
) -> None:
    path = tiny_model_path("llama")
    model = load_model(path)
    bridges: dict[tuple[Kind, int], Bridge] = {
        ("generated", layer): random_bridge(model, layer) for layer in LAYERS
    }
    with pytest.raises(FittedExitsError, match=message):
        bridged_engine(path, fitted_for(model, **{"bridges": bridges, **changes}), **exit)
