"""The benchmarks run, and their result files hold what they promise; no figure is judged."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.engine import Engine
from eevp_batch.engine.load import build_engine
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec, VocabSpec
from tests.bench import audit_delay, forced_trace, gpu, guarantee, scaling, step_profile, throughput
from tests.bench.costs import Costs, Exit, Work
from tests.bench.gpu import NoText
from tests.bench.quality import Judge, agreement
from tests.bench.systems import load_transformers, setting_of, with_batches
from tests.bench.trace import (
    NAIVE,
    OneBatch,
    draft_stands,
    force,
    trace_leaves,
)
from tests.conftest import Figures
from tests.tiny_models import NUM_LAYERS, build_model

PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.mark.slow
def test_throughput_keeps_figures_and_quality_of_every_system(
    tiny_llama: Path, tmp_path: Path, figures: Figures
) -> None:
    options = f"--model {tiny_llama} --limit 4 --rounds 2 --max-new-tokens 8"
    options += " --systems transformers-float32,eevp-float32-off-2"
    options += f" --threads {torch.get_num_threads()} --outputs {tmp_path}/o"
    found = figures(throughput, options)
    outputs = json.loads((tmp_path / "o").read_text())
    assert {"cpu", "commit", "date", "command", "torch", "threads"} <= found["setup"].keys()
    names = ["transformers-float32", "eevp-float32-off-2"]
    assert list(found["systems"]) == names
    for name, system in found["systems"].items():
        assert outputs[name] == outputs[names[0]], f"{name} differs from plain greedy decoding"
        assert system["against_float32_greedy"] == {"identical_rows": 4, "agreement": 1.0}
        assert system["tokens"] == sum(map(len, outputs[name]))
        assert len(system["tokens_per_s"]) == len(system["foreign_cores"]) == 2
        assert 0 < system["load_s"] < system["first_token_s"]
        assert system["peak_rss_bytes"] > 10 << 20
        assert system["mean_log_probability"] < 0
    ours = found["systems"]["eevp-float32-off-2"]
    assert ours["setting"]["limits"] == {"max_batch": 2}
    assert ours["first_row_s"] > 0


def test_a_hand_set_batch_follows_the_system_that_it_varies() -> None:
    names = with_batches(["vllm-bfloat16", "openvino-bfloat16"], {"openvino"}, [64, 128])
    assert names == ["vllm-bfloat16", "openvino-bfloat16", "openvino-bfloat16-128"], (
        "64 is what it has anyway"
    )
    assert setting_of(names[-1]) == setting_of("openvino-bfloat16") | {"batch": 128}
    with pytest.raises(SystemExit, match="found nothing-64"):
        setting_of("nothing-64")


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    assert agreement([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6, 7]]) == (1, 4 / 6)


def test_mean_log_probability_is_that_of_each_row_alone(tiny_llama: Path) -> None:
    outputs = [[11, 12], [13, 14, 15]]
    threads = torch.get_num_threads()
    model = load_transformers({"model": str(tiny_llama), "dtype": "float32", "threads": threads})
    total = 0.0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            scores = model(torch.tensor([prompt + output])).logits[0].double().log_softmax(-1)
        total += sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(output))
    found = Judge(str(tiny_llama), threads).mean_log_probability(PROMPTS, outputs)
    assert math.isclose(found, total / 5, rel_tol=1e-5)


COSTS = Costs(num_layers=30, layer=10.0, head=80.0, projection=1.0, width=2, vocab_size=40)


def test_full_depth_costs_every_layer_of_what_is_fed_and_a_head_per_token() -> None:
    assert COSTS.full_depth(num_prompt=5, num_generated=3) == Work(layers=7 * 300, last_head=240)


def test_a_row_that_never_goes_on_pays_nothing_behind_the_exit() -> None:
    needed = COSTS.with_exit(5, [10, 10, 10], Exit(10, "propagate"))
    assert needed == Work(layers=7 * 100, first_head=3 * 80)


def test_a_row_without_exits_pays_full_depth_and_the_head_at_the_exit() -> None:
    for kv in ("propagate", "recompute"):
        needed = COSTS.with_exit(5, [30, 30, 30], Exit(10, kv))
        assert needed == COSTS.full_depth(5, 3) + Work(first_head=240)


def test_what_waits_is_projected_or_run_again_when_a_token_goes_on() -> None:
    exit_layers = [10, 10, 10, 30, 10]  # the prompt's last token and two more wait for the fourth
    pruned = Exit(10, "propagate", final_head="pruned", top_k=4)
    assert COSTS.with_exit(5, exit_layers, pruned) == Work(
        layers=9 * 100 + (5 + 1) * 200, first_head=5 * 80, last_head=8, projections=2 * 20
    )
    assert COSTS.with_exit(5, exit_layers, Exit(10, "recompute")) == Work(
        layers=9 * 100 + (5 + 3) * 200, first_head=5 * 80, last_head=80
    )


def test_drafts_are_scored_by_the_last_layer_and_a_fallen_one_costs_what_followed() -> None:
    # Four leave, the fifth goes on and takes them along: 0 and 1 stand, 2 falls, 3 and 4 are lost.
    # Then 3 leaves once more and 4 goes on. Four tokens of the prompt are fed before all that.
    leaves, stands = [True, True, True, True, False], [True, True, False, True, True]
    exit = Exit(10, "verify", max_waiting=4)
    assert COSTS.with_drafts(5, leaves, stands, exit) == Work(
        layers=(4 + 5 + 2) * 100 + (4 + 5 + 2) * 200, first_head=7 * 80, last_head=7 * 80
    )
    # Nobody goes on: the end of the row has its drafts scored, and nothing more is fed.
    assert COSTS.with_drafts(5, [True] * 3, [True] * 3, exit) == Work(
        layers=7 * 100 + 7 * 200, first_head=3 * 80, last_head=3 * 80
    )
    # Two may wait, so that the third goes on.
    capped = COSTS.with_drafts(5, [True] * 3, [True] * 3, Exit(10, "verify", max_waiting=2))
    assert capped == COSTS.full_depth(5, 3) + Work(first_head=3 * 80)


def small_engine(kv: str, max_waiting: int = 3, num_new: int = 24) -> Engine:
    """A tiny engine with an exit after half of its layers; every row pays all of its prompt."""
    exits = ExitSpec(
        layers=[NUM_LAYERS // 2], kv=kv, max_waiting=max_waiting, vocab=VocabSpec(top_k=32)
    )
    limits = EngineSpec(max_batch=4, prefix_sharing=False)
    sampling = SamplingSpec(max_new_tokens=num_new)
    return build_engine(build_model("llama"), NoText(), exits, sampling, limits)


@pytest.mark.parametrize("fraction", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_the_account_is_what_an_engine_runs(kv: str, fraction: float) -> None:
    half, num_new, acceptance = NUM_LAYERS // 2, 24, 0.7
    engine = small_engine(kv, num_new=num_new)
    force(engine, fraction, acceptance=acceptance)
    prompts = [Prompt(row, [3 + row] * (2 + row)) for row in range(9)]
    done = {result.row_id: result for result in engine.generate(prompts)}
    costs = Costs(NUM_LAYERS, layer=1.0, head=0.0, projection=0.0, width=1, vocab_size=1)
    exit, needed = Exit(half, kv, max_waiting=3), Work()
    for prompt in prompts:
        row, num_prompt = done[prompt.row_id], len(prompt.token_ids)
        assert isinstance(row, Generation) and row.generated_tokens == num_new
        leaves = [trace_leaves(row.seed, step, fraction) for step in range(num_new)]
        stands = [draft_stands(row.seed, step, acceptance) for step in range(num_new)]
        if kv == "verify":
            needed += costs.with_drafts(num_prompt, leaves, stands, exit)
            continue
        needed += costs.with_exit(num_prompt, row.exit_layers, exit)
        if kv == "propagate":
            assert row.exit_layers == [half if may else NUM_LAYERS for may in leaves]
    assert needed.layers == engine.stats.packed_tokens * half, (
        "tokens that ran through one of the two equal segments"
    )


def test_no_more_than_may_wait_waits() -> None:
    engine = small_engine("recompute", max_waiting=3)
    force(engine, 1.0)
    (row,) = engine.generate([Prompt(0, [5, 6, 7])])
    assert isinstance(row, Generation)
    half = NUM_LAYERS // 2
    assert row.exit_layers == [half, half, half, NUM_LAYERS] * 6


def test_who_came_furthest_goes_on_in_a_naive_batch() -> None:
    queues: OneBatch = OneBatch(num_depths=2, max_batch=4, full_batch=2, max_tokens=8, age_cap=1)
    for name in ("a", "b", "c"):
        queues.push(0, name)
    queues.push(1, "d")
    assert queues.pop(lambda depth, name: 1) == (1, ["d"]), "grouping would take the full queue"
    assert queues.pop(lambda depth, name: 1) == (0, ["a", "b", "c"])


@pytest.mark.slow
def test_a_forced_trace_holds_ideal_and_measured_side_by_side(
    tiny_llama: Path, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--model {tiny_llama} --dtype float32 --rows 12 --new-tokens 16"
    options += " --rounds 2 --layers 2 --fractions 0 0.5 --top-k 32"
    found = figures(forced_trace, f"{options} --threads {torch.get_num_threads()}")
    rows = {(row["policy"], row["fraction"]): row for row in found["rows"]}
    policies = [*forced_trace.GROUPED, *NAIVE]
    assert list(rows) == [(policy, f) for f in (0.0, 0.5) for policy in policies]
    assert len({row["batch"] for row in rows.values()}) == 1, "the naive batch is as large as ours"
    for row in rows.values():
        assert row["share_of_ideal"] == row["measured"] / row["ideal"]
        assert row["share_of_trace_ideal"] == row["measured"] / row["trace_ideal"]
        assert row["ideal"] < row["ideal_without_first_head"]
        assert len(row["tokens_per_s"]) == len(row["off_tokens_per_s"]) == 2
    for policy in policies:
        row = rows[policy, 0.0]
        assert row["mean_exit_layer"] == 6.0
        assert row["ideal"] == row["trace_ideal"] < 1, "nobody leaves, and all pay the exit"
    assert 3.2 < rows["propagate", 0.5]["mean_exit_layer"] < 4.8, "half leave after layer 2 of 6"
    ours, waits, mean = (rows[policy, 0.5] for policy in ("propagate", *NAIVE))
    assert ours["forced_out"] == ours["held_back"] == 0, "each token does what the trace says"
    assert ours["ideal"] == ours["trace_ideal"]
    assert waits["forced_out"] == 0 < waits["held_back"]
    assert waits["ideal"] < waits["trace_ideal"]
    assert mean["forced_out"] + mean["held_back"] > 0
    assert rows["verify", 0.5]["ideal"] < rows["recompute", 0.5]["ideal"] < ours["ideal"]
    assert "f = 0, recompute, layer 2: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_the_parts_of_a_step_are_the_whole_step(
    tiny_llama: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (step_profile.exits_module, "summarise"),
        (step_profile.stage_module, "pack"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back: a clock stays around it
    options = f"--model {tiny_llama} --dtype float32 --batch 6 --context 30 --steps 4"
    found = figures(step_profile, f"{options} --threads {torch.get_num_threads()}")
    assert {*step_profile.REASONS, "else"} == {row["part"] for row in found["parts"]}
    assert all(row["ms"] > 0 for row in found["parts"])
    assert sum(row["ms"] for row in found["parts"]) == pytest.approx(found["step_ms"])
    assert 24 < found["context"] < 40, "tokens per sequence, about as many as were asked for"


@pytest.mark.slow
def test_what_a_shared_prefix_saves_is_kept(tiny_llama: Path, figures: Figures) -> None:
    options = f"prefix --model {tiny_llama} --dtype float32 --rows 4 --prefix-tokens 70"
    options += " --max-new-tokens 4 --rounds 1 --batch 2"
    found = figures(scaling, f"{options} --threads {torch.get_num_threads()}")
    assert {"cpu", "commit", "date", "command", "torch"} <= found["setup"].keys()
    assert (found["rows"], found["prefix_tokens"], found["identical_rows"]) == (4, 70, 4)
    shared, alone = (found["systems"][name]["tokens_per_s"] for name in ("shared", "not shared"))
    assert found["ratio"] == shared[0] / alone[0]


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(figures: Figures, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --shape tiny --batches 3 --new-tokens 12 --prompt-tokens 9"
    systems = [gpu.CONTINUOUS, gpu.STATIC, *gpu.POLICIES]
    found = figures(gpu, f"{options} --rounds 1 --acceptance 1 --systems", *systems)
    assert gpu.CPU_WARNING in capsys.readouterr().out
    assert found["setup"]["warning"] == gpu.CPU_WARNING
    runs = {run["system"]: run for run in found["runs"]}
    assert list(runs) == systems
    assert all(run["tokens_per_s"][0] > 0 for run in found["runs"])
    assert "reason" not in runs[gpu.CONTINUOUS], runs[gpu.CONTINUOUS].get("reason")
    assert runs[gpu.CONTINUOUS]["one_token_s"] > 0
    assert runs["off"]["mean_exit_layer"] == 4 > runs["propagate"]["mean_exit_layer"]
    assert runs["verify"]["accepted"] == 1, "the script says which drafts stand"


def test_a_rival_that_fails_is_replaced_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = "gpu --device cpu --shape tiny --new-tokens 3 --prompt-tokens 4 --rounds 1"
    monkeypatch.setattr(sys, "argv", command.split())
    chosen = gpu.options()
    model = gpu.build_model("tiny", "cpu", torch.float32)
    model.generate_batch = None  # as in a version that does not have it
    found = gpu.continuous(model, chosen, 2, gpu.CONTINUOUS)
    assert found["ran"] == gpu.STATIC and found["tokens_per_s"][0] > 0
    assert "transformers-continuous failed (TypeError" in found["reason"]


def test_guarantee_keeps_an_outcome_of_every_world(figures: Figures) -> None:
    found = figures(guarantee, "--repetitions 3 --rows 50 --delta 0.1")
    assert found["setup"]["repetitions"] == 3
    kinds = {(row["world"], row["path"], row["certifier"]) for row in found["outcomes"]}
    assert len(kinds) == len(guarantee.WORLDS) * len(guarantee.PATHS) * len(guarantee.CERTIFIERS)
    assert all(0 <= row["violations"] <= 3 for row in found["outcomes"])


def test_audit_delay_keeps_every_case(figures: Figures) -> None:
    found = figures(audit_delay, "--good-rows 200 --jobs 3 --good-jobs 4")
    assert len(found["cases"]) == len(audit_delay.CASES) * len(audit_delay.LENGTHS)
    for case in found["cases"]:
        assert 0 < case["median"] <= case["most"] <= 200
        assert case["ratio"] == case["sum_since_the_start"] / case["median"]
    alarms = found["without_a_change"]
    assert alarms["jobs"] == 4 and alarms["interval"][0] <= alarms["warned"] / 4
