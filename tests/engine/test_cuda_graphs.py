"""Recorded runs of decode-only packs, with a recorder that does the work again.

What a graph would repeat is the work on a bucket's own tensors; that is all that runs here too, so
that buckets, rows of padding and what is filled in are those of a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from eevp_batch.engine.attention import Kernel
from eevp_batch.engine.cuda_graphs import Again, Bucket, Recorder, SegmentRunner, recorder_for
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import Bridge
from eevp_batch.engine.packing import Lookup, PackedTokens
from eevp_batch.engine.paged_kernels import Flex
from eevp_batch.engine.sequence import Kind, Origin
from eevp_batch.records import Prompt
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import load_model, make_engine, run
from tests.engine.test_bridges import LAYERS, bridged_engine, exits_of, fitted_for, random_bridge

EARLY, LATE = Origin("generated", 2), Origin("generated", 4)


class Refuses:
    """A device that cannot record."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Counts:
    """Does the work again and knows how often."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()  # as a warm-up does, on rows of the scratch page

        def again() -> None:
            self.repeated += 1
            work()

        return again


def small_pages() -> Kernel:
    kernel = Flex(2, run=flex.flex_attention)
    kernel.page_size = 8
    return kernel


def make_recording(path: Path, recorder: Recorder | None, **settings: Any) -> Engine:
    engine = make_engine(
        path,
        kernel=small_pages(),
        threshold=0.35,
        layers=LAYERS,
        sampling=SamplingSpec(max_new_tokens=8),
        limits={"max_resident": 5},  # a small pool: Flex as written looks at all of it
        **settings,
    )
    engine.stages[0].runner = SegmentRunner(engine._model, engine.pool, recorder)
    return engine


@pytest.fixture(autouse=True)
def run_flex_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.parametrize("kv", ["propagate", "verify"])
def test_recorded_runs_give_what_direct_runs_give(
    tiny_llama: Path, prompts: list[Prompt], kv: str
) -> None:
    few = prompts[:5]
    expected = run(make_recording(tiny_llama, None, kv=kv), few)
    counts = Counts()
    engine = make_recording(tiny_llama, counts, kv=kv)
    found = run(engine, few)
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids
        assert found[key].exit_layers == generation.exit_layers
        near = pytest.approx(generation.exit_confidences, abs=1e-5)
        assert found[key].exit_confidences == near
    buckets = engine.stages[0].runner.buckets
    assert counts.recorded == len(buckets) > 3
    assert counts.repeated > 2 * counts.recorded, "a recording is used again and again"
    assert {bucket.depth for bucket in buckets} == {0, 1, 2}
    projects = {bool(bucket.origins) for bucket in buckets}
    assert projects == ({False, True} if kv == "propagate" else {False})


def test_a_recording_has_its_bridges_by_origin(tiny_llama: Path, prompts: list[Prompt]) -> None:
    model = load_model(tiny_llama)
    bridges: dict[tuple[Kind, int], Bridge] = {
        ("generated", layer): random_bridge(model, layer) for layer in LAYERS
    }
    fitted = fitted_for(model, bridges)
    engines = [
        bridged_engine(tiny_llama, fitted, kernel=small_pages(), limits={"max_resident": 5})
        for _ in range(2)
    ]
    engines[1].stages[0].runner = SegmentRunner(engines[1]._model, engines[1].pool, Counts())
    expected, found = (exits_of(run(engine, prompts[:6])) for engine in engines)
    assert found == expected
    seen = {
        origin for bucket in engines[1].stages[0].runner.buckets for origin, _ in bucket.origins
    }
    assert seen == {EARLY, LATE}, "tokens of both exits were bridged in recorded runs"


def test_an_engine_goes_on_where_recording_fails(
    tiny_llama: Path, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    few = prompts[:4]
    expected = run(make_recording(tiny_llama, None), few)
    engine = make_recording(tiny_llama, Refuses())
    with caplog.at_level(logging.WARNING):
        found = run(engine, few)
    assert {key: row.token_ids for key, row in found.items()} == {
        key: row.token_ids for key, row in expected.items()
    }
    warnings = [record.getMessage() for record in caplog.records if "graphs" in record.name]
    assert len(warnings) == 1, "it is said once"
    assert warnings[0].endswith("operation not permitted when stream is capturing")
    assert not engine.stages[0].runner.buckets


def test_nothing_is_recorded_beyond_the_most_graphs(
    tiny_llama: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eevp_batch.engine.cuda_graphs.MOST_GRAPHS", 2)
    few = prompts[:4]
    engine = make_recording(tiny_llama, Again())
    found = run(engine, few)
    expected = run(make_recording(tiny_llama, None), few)
    assert len(engine.stages[0].runner.buckets) == 2
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids


def bucket_of(num_rows: int, num_projected: int, num_pages: int) -> Bucket:
    rows = torch.zeros(num_rows, dtype=torch.int64)
    waiting = torch.zeros(num_projected, dtype=torch.int64)
    origins = [(LATE, slice(0, num_projected))] if num_projected else []
    tokens = PackedTokens(
        rows, rows, rows, [], rows, waiting, waiting, waiting[:0], origins, [], num_rows
    )
    tables = torch.zeros(num_rows, num_pages, dtype=torch.int32)
    return Bucket.of(1, tokens, Lookup(rows, rows, tables, 1))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 0, 1), (16, 0, 1)),
        ((16, 16, 2), (16, 16, 2)),
        ((17, 17, 3), (32, 32, 4)),
        ((48, 100, 5), (48, 128, 8)),
        ((65, 128, 8), (96, 128, 8)),
        ((144, 129, 9), (192, 256, 16)),
        ((256, 1000, 33), (256, 1024, 64)),
    ],
)
def test_a_bucket_is_a_little_larger_than_its_packs(
    sizes: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    num_rows, num_projected, num_pages = expected
    origins = ((LATE, num_projected),) if num_projected else ()
    assert bucket_of(*sizes) == (1, num_rows, origins, num_pages)


def test_the_order_of_origins_makes_no_bucket() -> None:
    rows = torch.zeros(48, dtype=torch.int64)
    tables = torch.zeros(48, 2, dtype=torch.int32)
    buckets = set()
    for sizes in ({LATE: 16, EARLY: 32}, {EARLY: 32, LATE: 16}):
        start, origins = 0, []
        for origin, size in sizes.items():
            origins.append((origin, slice(start, start + size)))
            start += size
        tokens = PackedTokens(rows, rows, rows, [], rows, rows, rows, rows[:0], origins, [], 48)
        buckets.add(Bucket.of(1, tokens, Lookup(rows, rows, tables, 1)))
    assert len(buckets) == 1


def test_there_are_few_buckets_and_little_padding() -> None:
    buckets = {size: bucket_of(size, 0, 1).num_rows for size in range(16, 1025)}
    assert all(size <= rows <= 1.5 * size + 16 for size, rows in buckets.items())
    assert len(set(buckets.values())) < 20


def test_a_cpu_records_nothing(tiny_llama: Path) -> None:
    assert recorder_for(make_engine(tiny_llama)._model) is None
    assert recorder_for(make_engine(tiny_llama, kernel=small_pages())._model) is None
