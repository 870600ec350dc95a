"""The engine's first rules again on a CUDA device, and what only such a device can show.

Every way to attend, with and without graphs, against the CPU or against gathering; and that a step
waits for the device once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from eevp_batch.engine.attention import Gather, Kernel, paged_attention
from eevp_batch.engine.cuda_graphs import SegmentRunner
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.kernel_choice import choose_kernel, objection_to
from eevp_batch.engine.paged_kernels import AttentionShape, Flex, Varlen
from eevp_batch.records import Prompt
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import greedy, load_model, make_engine, run
from tests.engine.test_paged_kernels import pack_with_a_gap
from tests.tiny_models import build_model

pytestmark = [
    pytest.mark.gpu,
    # What torch's compiler says of a float32 model on such a device.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    """The kernels of many models are more than torch's compiler keeps for one function."""
    torch._dynamo.reset()


KERNELS: dict[str, Callable[[], Kernel]] = {
    "gather": Gather,
    "flex": lambda: Flex(HEADS // KV_HEADS),
    "varlen": Varlen,
}


def shape_of(dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(torch.device("cuda", 0), dtype, HEADS, KV_HEADS, HEAD_SIZE)


def kernel_for(name: str, dtype: torch.dtype) -> Kernel:
    """The kernel; skips where this torch has none for such numbers."""
    kernel = KERNELS[name]()
    if isinstance(kernel, (Varlen, Flex)):
        objection = kernel.objection(shape_of(dtype))
        if objection is not None:
            pytest.skip(objection)
    return kernel


def wide_model(family: str = "llama") -> PreTrainedModel:
    """A tiny model whose heads are wide enough for every kernel."""
    return build_model(family, head_dim=HEAD_SIZE)


def test_exits_off_equals_greedy_on_the_device(any_tiny_model: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(any_tiny_model, model=load_model(any_tiny_model).cuda())
    found = run(engine, prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(any_tiny_model, prompt)


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


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_a_paged_kernel_attends_as_gathering_does(
    kernel: str, dtype: torch.dtype, window: int | None
) -> None:
    paged = kernel_for(kernel, dtype)
    assert objection_to(paged, shape_of(dtype)) is None
    found, expected = (attended(each, dtype, window) for each in (paged, Gather()))
    near = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=0, atol=near)


def attended(kernel: Kernel, dtype: torch.dtype, window: int | None) -> torch.Tensor:
    """The real rows of a pack with a gap in it through one layer, [N, H, D] float32."""
    tokens, pool = pack_with_a_gap(kernel, shape_of(dtype))
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(1, heads, tokens.num_rows, HEAD_SIZE, generator=generator).to(dtype).cuda()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    layer: Any = SimpleNamespace(layer_idx=0)
    layout = kernel.layout(tokens, pool)
    with torch.inference_mode():
        out, _ = paged_attention(
            layer, query, key, value, None, layout=layout, scaling=0.3, sliding_window=window
        )
    return out[0, : tokens.num_tokens].float()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("kernel", "graphs"), [*product(["gather", "flex"], [True, False])])
@pytest.mark.parametrize("kv", ["propagate", "verify"])
def test_every_path_gives_what_the_cpu_gives(
    tiny_llama: Path, prompts: list[Prompt], family: str, kernel: str, graphs: bool, kv: str
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.35, "kv": kv, "max_batch": 8}
    expected = run(make_engine(tiny_llama, model=wide_model(family), **settings), prompts)
    engine = make_engine(
        tiny_llama,
        model=wide_model(family).cuda(),
        kernel=kernel_for(kernel, torch.float32),
        **settings,
    )
    if not graphs:
        stop_recording(engine)
    found = run(engine, prompts)
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids
        assert found[key].exit_layers == generation.exit_layers
        near = pytest.approx(generation.exit_confidences, abs=1e-4)
        assert found[key].exit_confidences == near
    assert bool(engine.stages[0].runner.buckets) == (graphs and kernel != "gather")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_paged_kernels_in_bfloat16_give_nearly_what_gathering_gives(
    tiny_llama: Path, prompts: list[Prompt], kernel: str, graphs: bool
) -> None:
    """Rounding may turn a token, and then all that follow; it must not turn many rows' first."""
    sampling = SamplingSpec(max_new_tokens=8)
    texts = []
    for each in (kernel_for(kernel, torch.bfloat16), Gather()):
        model = wide_model().to(torch.bfloat16).cuda()
        engine = make_engine(tiny_llama, model=model, kernel=each, sampling=sampling, max_batch=8)
        if not graphs:
            stop_recording(engine)
        texts.append(run(engine, prompts))
    same = [texts[1][key].token_ids[:4] == row.token_ids[:4] for key, row in texts[0].items()]
    assert sum(same) >= 0.75 * len(same)


def stop_recording(engine: Engine) -> None:
    engine.stages[0].runner = SegmentRunner(engine._model, engine.pool, None)


def test_the_device_gets_the_first_kernel_that_works() -> None:
    has_tables = Varlen.objection(shape_of(torch.bfloat16)) is None
    assert has_tables == ("block_table" in str(varlen.varlen_attn.__doc__))
    half = choose_kernel(shape_of(torch.bfloat16))
    assert isinstance(half, Varlen if has_tables else Flex)
    assert isinstance(choose_kernel(shape_of(torch.float32)), Flex)
    small = shape_of(torch.float32)._replace(head_size=8)
    assert isinstance(choose_kernel(small), Gather)


@pytest.mark.parametrize("kernel", ["gather", "flex"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kv", ["propagate", "verify"])
def test_a_step_waits_for_the_device_once(
    tiny_llama: Path, prompts: list[Prompt], kernel: str, temperature: float, kv: str
) -> None:
    engine = make_engine(
        tiny_llama,
        model=wide_model().cuda(),
        kernel=kernel_for(kernel, torch.float32),
        layers=[2, 4],
        threshold=0.35,
        kv=kv,
        sampling=SamplingSpec(max_new_tokens=40, temperature=temperature),
        max_batch=len(prompts),
    )
    stop_recording(engine)  # recording waits, and repeating is covered by what it repeats
    for prompt in prompts:
        engine.add(prompt)
    for _ in range(20):
        engine.step()
    waits = [number_of_waits(engine) for _ in range(10)]
    assert max(waits) == 1, f"steps waited {waits} times"


def number_of_waits(engine: Engine) -> int:
    """How often a step waits for the device, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)
