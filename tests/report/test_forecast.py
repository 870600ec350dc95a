from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.report.forecast import PromptCounts, flops_per_token, forecast
from eevp_batch.report.text import render_forecast
from eevp_batch.spec import ExitSpec, JobSpec, PromptSpec, SamplingSpec, VocabSpec
from tests.storage.jobs import MODEL, make_spec

LENGTHS = st.dictionaries(st.integers(1, 5000), st.integers(1, 100), min_size=1, max_size=20)


def spec_with(
    exit: ExitSpec | None = None, prompt: PromptSpec | None = None, n: int = 1
) -> JobSpec:
    sampling = SamplingSpec(n=n, max_new_tokens=10)
    spec = make_spec("in.parquet", exit=exit or ExitSpec(), prompt=prompt or PromptSpec())
    return spec.model_copy(update={"sampling": sampling})


def counts_of(lengths: dict[int, int], failures: int = 0, max_tokens: int = 100) -> PromptCounts:
    failed = Counter({"EmptyPromptError": failures}) if failures else Counter[str]()
    rows = sum(lengths.values()) + failures
    return PromptCounts(rows, Counter(lengths), failed, max_tokens)


@given(LENGTHS)
def test_buckets_hold_every_prompt_once(lengths: dict[int, int]) -> None:
    buckets = counts_of(lengths).buckets
    assert sum(buckets.values()) == sum(lengths.values())
    for label, count in buckets.items():
        low, _, high = label.partition("-")
        inside = [n for length, n in lengths.items() if int(low) <= length <= int(high or low)]
        assert sum(inside) == count, f"bucket {label} holds what its bounds say"


@given(LENGTHS, st.integers(1, 5000))
def test_overlong_rows_are_left_out_or_cut(lengths: dict[int, int], limit: int) -> None:
    counts = counts_of(lengths, max_tokens=limit)
    short = {length: n for length, n in lengths.items() if length <= limit}
    assert counts.overlong == sum(lengths.values()) - sum(short.values())
    left_out = forecast(spec_with(), MODEL, counts, counts.rows, 1, 1)
    assert left_out.prompt_tokens == sum(length * n for length, n in short.items())
    assert left_out.max_generated_tokens == 10 * sum(short.values())
    cut = forecast(
        spec_with(prompt=PromptSpec(on_overlong="truncate_left")), MODEL, counts, counts.rows, 1, 1
    )
    assert cut.prompt_tokens == sum(min(length, limit) * n for length, n in lengths.items())


def test_a_sample_is_scaled_up() -> None:
    counts = counts_of({10: 3, 20: 1}, failures=1)
    found = forecast(spec_with(n=2), MODEL, counts, rows=500, chunks=7, files=2)
    assert found.prompt_tokens == 5000
    assert found.max_generated_tokens == 500 * 4 // 5 * 2 * 10
    assert found.kv_bytes_per_sequence == (20 + 10) * MODEL.kv_bytes_per_token("bfloat16")


def test_full_depth_costs_two_operations_per_weight() -> None:
    least, most = flops_per_token(spec_with(ExitSpec(mode="off")), MODEL)
    assert least == most == 2 * (6 * MODEL.layer_weights + MODEL.head_weights)


def test_pruning_spares_heads_and_an_early_exit_spares_layers() -> None:
    def cost(**vocab: object) -> tuple[int, int]:
        return flops_per_token(spec_with(ExitSpec(vocab=VocabSpec(**vocab))), MODEL)  # type: ignore[arg-type]

    assert cost(top_k=8)[1] < cost(top_k=None)[1], "later exits score fewer ids"
    assert cost(top_k=8, final_head="pruned")[1] < cost(top_k=8)[1], "and so does the last layer"
    full = flops_per_token(spec_with(ExitSpec(mode="off")), MODEL)[1]
    assert cost(top_k=8)[0] < full < cost(top_k=8)[1], "a check costs, an exit saves more"
    projected = 2 * 2 * MODEL.num_kv_heads * MODEL.head_size * MODEL.hidden_size
    first = 2 * (2 * MODEL.layer_weights + MODEL.head_weights)
    assert cost(top_k=8)[0] == first + 4 * projected, "skipped layers get keys and values"


def test_a_forecast_is_json_and_text() -> None:
    counts = counts_of({3: 2, 300: 1}, failures=1)
    found = forecast(spec_with(), MODEL, counts, rows=4, chunks=1, files=1)
    data = json.loads(json.dumps(found.to_json()))
    assert data["counts"]["overlong"] == 1 and data["counts"]["longest"] == 300
    assert data["counts"]["failures"] == {"EmptyPromptError": 1}
    text = render_forecast(found, 80)
    assert "over-long rows  1, over 100 tokens" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_job_whose_rows_all_fail_costs_nothing() -> None:
    found = forecast(spec_with(), MODEL, counts_of({}, failures=3), rows=3, chunks=1, files=1)
    assert (found.prompt_tokens, found.max_generated_tokens, found.flops_most) == (0, 0, 0.0)
    assert "rows by prompt tokens" not in render_forecast(found, 80)
