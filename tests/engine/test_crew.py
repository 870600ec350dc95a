"""Several devices, as cores of this CPU: each a thread, and every row as on one device."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel

from eevp_batch.engine.devices import Device, single_cores
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.limits import page_bytes
from eevp_batch.engine.load import build_engine
from eevp_batch.engine.packing import PackedTokens
from eevp_batch.engine.placed_model import place_model
from eevp_batch.errors import EngineStalledError, UsageError
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from tests.engine.conftest import NEW_TOKENS, greedy, load_model, make_engine, run
from tests.engine.test_bridges import bridged_engine, with_prompts
from tests.engine.test_kv_policies import few, jobs
from tests.tiny_models import NUM_LAYERS

DEPTHS = {2: [3], 3: [2, 4], 5: [1, 2, 3, 5]}  # exit layers before the last, by their number D
POLICIES = ["propagate", "recompute", "verify"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_end() -> Any:
    """No thread of a test outlives it, and the main thread keeps its cores."""
    cores = os.sched_getaffinity(0)
    yield
    deadline = time.monotonic() + 60
    while any(t.name.startswith("eevp-device") for t in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread of a device does not end"
        time.sleep(0.01)
    assert os.sched_getaffinity(0) == cores


@cache
def weights(path: Path) -> PreTrainedModel:
    return load_model(path)


def cpus(count: int) -> list[Device]:
    """Devices of a core each, which they share where there are too few; nothing is timed here."""
    cores = sorted(os.sched_getaffinity(0))
    return [Device(CPU, (cores[number % len(cores)],)) for number in range(count)]


def engine_on(path: Path, count: int, **settings: Any) -> Engine:
    return make_engine(path, model=weights(path), devices=cpus(count), **settings)


def assert_same(
    found: dict[Any, Generation], expected: dict[Any, Generation], near: float = 1e-4
) -> None:
    assert found.keys() == expected.keys()
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids, f"row {key} depends on the devices"
        assert found[key].exit_layers == generation.exit_layers
        assert found[key].exit_confidences == pytest.approx(generation.exit_confidences, abs=near)


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("num_depths", sorted(DEPTHS))
def test_two_devices_give_what_one_gives(
    tiny_llama: Path, prompts: list[Prompt], num_depths: int, kv: str
) -> None:
    settings = {"layers": DEPTHS[num_depths], "threshold": 0.3, "kv": kv, "max_waiting": 3}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    engine = engine_on(tiny_llama, 2, **settings)
    assert [stage.depths.stop for stage in engine.stages][-1] == num_depths
    assert_same(run(engine, prompts), expected)
    assert len(engine.stats.steps) == num_depths, "every segment ran"
    assert_same(run(engine, prompts), expected)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_prompts_that_are_given_up_leave_nothing_behind(
    tiny_llama: Path, prompts: list[Prompt], num_steps: int
) -> None:
    settings: dict[str, Any] = {"layers": [2, 4], "threshold": 0.3}
    alone = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    expected = {generation.row_id: generation for generation in alone.values()}
    engine = engine_on(tiny_llama, 2, **settings)
    for number, prompt in enumerate(prompts):
        engine.add(replace(prompt, tag=number % 2))
    found = [result for _ in range(num_steps) for result in engine.step()]
    num_open = len(prompts) // 2 - sum(result.tag == 1 for result in found)
    assert engine.give_up(1) == num_open and engine.give_up(1) == 0
    before = len(found)
    while not engine.is_idle:
        found += engine.step()
    assert all(result.tag == 0 for result in found[before:])
    kept = {result.row_id: result for result in found if isinstance(result, Generation)}
    assert {prompt.row_id for prompt in prompts[::2]} <= kept.keys()
    assert_same(kept, {row_id: expected[row_id] for row_id in kept})
    assert engine.pool.is_empty, "they still hold pages"
    assert engine.stats.tokens == sum(len(generation.exits) for generation in kept.values())


@pytest.mark.parametrize("kv", POLICIES)
def test_as_many_devices_as_segments(tiny_llama: Path, prompts: list[Prompt], kv: str) -> None:
    settings = {"layers": [2, 4], "threshold": 0.3, "kv": kv, "max_waiting": 3}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    engine = engine_on(tiny_llama, 3, **settings)
    assert [stage.depths for stage in engine.stages] == [range(1), range(1, 2), range(2, 3)]
    assert_same(run(engine, prompts), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": SamplingSpec(temperature=0.9, top_p=0.95, max_new_tokens=16)},
        {"sampling": SamplingSpec(temperature=0.9, max_new_tokens=16), "kv": "verify"},
        {"sampling": SamplingSpec(repetition_penalty=1.4, max_new_tokens=16)},
        {"vocab": {"prune_layer": 3, "final_head": "pruned"}, "layers": [1, 3, 5]},
        {"vocab": {"proposal": "low_rank", "rank": 8, "final_head": "pruned"}},
        {"confidence": "hidden_cosine"},
    ],
    ids=["sampled", "sampled-verify", "penalty", "pruned-late", "proposal", "cosine"],
)
def test_what_a_seat_remembers_goes_along(
    tiny_llama: Path, prompts: list[Prompt], settings: dict[str, Any]
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.3, "top_k": 12, **settings}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    assert_same(run(engine_on(tiny_llama, 3, **settings), prompts), expected)


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen3"])
def test_every_family(tiny_model_path: Any, prompts: list[Prompt], family: str) -> None:
    path = tiny_model_path(family)
    settings = {"layers": [2, 4], "threshold": 0.3}
    expected = run(make_engine(path, model=weights(path), **settings), prompts)
    assert_same(run(engine_on(path, 2, **settings), prompts), expected)


@pytest.mark.parametrize("prefill", ["full", "bridge"])
@pytest.mark.parametrize("count", [2, 3])
def test_bridges_find_the_states_of_other_devices(
    tiny_llama: Path, prompts: list[Prompt], prefill: str, count: int
) -> None:
    fitted = with_prompts(load_model(tiny_llama))
    expected = run(bridged_engine(tiny_llama, fitted, prefill=prefill), prompts)
    engine = build_engine(
        weights(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
        ExitSpec(
            layers=[2, 4],
            threshold=0.3,
            kv="bridge",
            heads="given",
            prefill=prefill,  # type: ignore[arg-type]
            vocab=VocabSpec(top_k=32),
        ),
        SamplingSpec(max_new_tokens=NEW_TOKENS),
        EngineSpec(max_batch=5, max_resident=15),
        fitted,
        devices=cpus(count),
    )
    assert_same(run(engine, prompts), expected)


def test_bridges_across_a_device_that_ends_before_the_first_exit_are_refused(
    tiny_llama: Path,
) -> None:
    model = weights(tiny_llama)
    whole = place_model(model, [NUM_LAYERS], cpus(4))
    with pytest.raises(UsageError, match="found bridges from layer 2 on; allowed with a device"):
        whole.recut([2, 4, NUM_LAYERS]).use(with_prompts(model))


@few
@given(job=jobs(), kv=st.sampled_from(POLICIES), num_pages=st.integers(4, 20))
def test_any_job_comes_out_as_on_one_device(
    tiny_llama: Path, job: dict[str, Any], kv: str, num_pages: int
) -> None:
    settings = {name: value for name, value in job.items() if name != "prompts"}
    settings |= {"model": weights(tiny_llama), "kv": kv}
    prompts = [Prompt(row, ids) for row, ids in enumerate(job["prompts"])]
    expected = run(make_engine(tiny_llama, **settings), prompts)
    engine = make_engine(tiny_llama, **settings)
    tight = settings["limits"] | {"kv_memory": num_pages * page_bytes(engine.model)}
    found = run(make_engine(tiny_llama, devices=cpus(2), **settings | {"limits": tight}), prompts)
    assert_same(found, expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_without_exits_devices_end_where_nobody_leaves(
    tiny_llama: Path, prompts: list[Prompt], count: int
) -> None:
    engine = engine_on(tiny_llama, count)
    found = run(engine, prompts)
    for prompt in prompts:
        assert found[prompt.row_id, 0].token_ids == greedy(tiny_llama, prompt)
        assert set(found[prompt.row_id, 0].exit_layers) == {NUM_LAYERS}
    assert len(engine.stats.steps) == count, "each device has a segment"


@pytest.mark.parametrize("kv", POLICIES)
def test_pages_that_run_out_change_nothing(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    sampling = SamplingSpec(max_new_tokens=70)
    settings = {"layers": [2, 4], "threshold": 0.35, "kv": kv, "sampling": sampling}
    prompts = prompts[:12]
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    tight = {"max_resident": 9, "kv_memory": 200_000}
    engine = engine_on(tiny_llama, 2, limits=tight, **settings)
    engine.stats.finished, engine.stats.exit_histogram[3] = 100, 100  # rows look short: no room
    assert_same(run(engine, prompts), expected)
    assert engine.stats.restarts > 0, "somebody had to make room"


def test_shared_prefixes(tiny_llama: Path) -> None:
    prompts = [Prompt(row, [*range(5, 105), 200 + row]) for row in range(8)]
    settings = {"layers": [2, 4], "threshold": 0.35}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    engine = engine_on(tiny_llama, 2, **settings)
    assert_same(run(engine, prompts), expected)
    assert engine.stats.shared_tokens > 0


def failing(engine: Engine, number: int, error: Exception, at_run: int = 3) -> None:
    """Let a run on a device end with an error."""
    layers = engine.model.parts[number].layers
    whole, runs = layers.run, [0]

    def broken(indices: range, hidden: Any, tokens: PackedTokens, pool: Any) -> Any:
        runs[0] += 1
        if runs[0] == at_run:
            raise error
        return whole(indices, hidden, tokens, pool)

    layers.run = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_on_one_device_ends_the_engine_with_it(
    tiny_llama: Path, prompts: list[Prompt], number: int
) -> None:
    engine = engine_on(tiny_llama, 2, layers=[2, 4])
    failing(engine, number, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(engine, prompts)
    engine.add(prompts[0])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()


@pytest.mark.parametrize("number", [0, 1])
def test_a_shortage_on_one_device_changes_no_row(
    tiny_llama: Path, prompts: list[Prompt], number: int
) -> None:
    settings = {"layers": [2, 4], "threshold": 0.3, "max_batch": 12}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    engine = engine_on(tiny_llama, 2, **settings)
    failing(engine, number, MemoryError())
    assert_same(run(engine, prompts), expected)
    assert engine.stats.shortages == 1


def test_a_run_that_is_given_up_goes_on_later(tiny_llama: Path, prompts: list[Prompt]) -> None:
    settings = {"layers": [2, 4], "threshold": 0.3}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    engine = engine_on(tiny_llama, 2, **settings)
    running = engine.generate(prompts)
    found = [next(running), next(running)]
    running.close()
    while not engine.is_idle:
        found += engine.step()
    assert engine.pool.is_empty or len(engine.prefixes), "only prefixes are kept"
    assert all(expected[g.row_id, 0].exits == g.exits for g in found if isinstance(g, Generation))


def test_work_that_nobody_can_take_is_a_stall(tiny_llama: Path, prompts: list[Prompt]) -> None:
    engine = engine_on(tiny_llama, 2, layers=[2, 4])
    engine._residents._seat = lambda sequence: False  # type: ignore[method-assign]
    engine.add(prompts[0])
    with pytest.raises(EngineStalledError, match="1 sequences wait"):
        engine.step()


def test_an_idle_engine_is_let_go(tiny_llama: Path, prompts: list[Prompt]) -> None:
    import weakref

    engine = engine_on(tiny_llama, 2, layers=[2, 4])
    run(engine, prompts[:4])
    gone = weakref.ref(engine)
    del engine
    deadline = time.monotonic() + 60
    while gone() is not None:
        gc.collect()
        assert time.monotonic() < deadline, "something holds an engine that is done"
        time.sleep(0.01)


def test_more_devices_than_segments_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="devices: found 3; allowed: at most 2"):
        engine_on(tiny_llama, 3, layers=[3])


def test_more_cores_than_there_are_are_refused() -> None:
    assert len(single_cores(1)[0].cores) == 1
    with pytest.raises(UsageError, match="devices: found 4096 cores; allowed: at most"):
        single_cores(4096)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", POLICIES)
def test_a_gpu_and_the_cpu_give_what_the_cpu_gives(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    """Both ways round: states, kept vocabulary and drafts cross the border either way."""
    settings = {"layers": [2, 4], "threshold": 0.3, "kv": kv, "max_waiting": 3}
    expected = run(make_engine(tiny_llama, model=weights(tiny_llama), **settings), prompts)
    devices = [Device(torch.device("cuda", 0)), Device(CPU)]
    for order in (devices, devices[::-1]):
        model = load_model(tiny_llama)
        engine = make_engine(tiny_llama, model=model, devices=order, **settings)
        assert [part.device for part in engine.model.parts] == [device.at for device in order]
        assert_same(run(engine, prompts), expected, near=1e-3)
