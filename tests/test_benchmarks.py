"""The benchmarks run, and their result files hold what they promise; no figure is judged."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import forced_trace, gpu, throughput
from tests.bench.costs import Costs, Exit, Work
from tests.bench.quality import Judge, agreement
from tests.bench.systems import load_transformers, setting_of, with_batches
from tests.bench.trace import POLICIES

PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.mark.slow
def test_throughput_keeps_figures_and_quality_of_every_system(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"throughput --model {tiny_llama} --limit 4 --rounds 2 --max-new-tokens 8"
    command += f" --systems transformers-float32,eevp-float32-off-2 --out {tmp_path}/r"
    command += f" --threads {torch.get_num_threads()} --outputs {tmp_path}/o"
    monkeypatch.setattr(sys, "argv", command.split())
    throughput.main()
    found = json.loads((tmp_path / "r").read_text())
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


@pytest.mark.slow
def test_a_forced_trace_decides_who_leaves(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"forced_trace --model {tiny_llama} --dtype float32 --rows 12 --new-tokens 16"
    command += " --rounds 1 --layers 2 --fractions 0 0.5 --top-k 32 --naive-batch 4"
    command += f" --threads {torch.get_num_threads()} --out {tmp_path}/r"
    monkeypatch.setattr(sys, "argv", command.split())
    forced_trace.main()
    found = json.loads((tmp_path / "r").read_text())
    layers = {(row["kv"], row["fraction"]): row["mean_exit_layer"] for row in found["grouped"]}
    assert layers["propagate", 0.0] == layers["recompute", 0.0] == 6.0
    assert 3.2 < layers["propagate", 0.5] < 4.8, "half of them leave after layer 2 of 6"
    naive = {(row["fraction"], row["policy"]): row for row in found["naive"]}
    for row in found["grouped"]:
        assert row["ideal"] < row["ideal_without_first_head"]
    ours, waits, mean = (naive[0.5, policy] for policy in POLICIES)
    assert ours["forced_out"] == ours["held_back"] == 0, "each token does what the trace says"
    assert waits["forced_out"] == 0 < waits["held_back"]
    assert mean["forced_out"] > 0 and mean["held_back"] > 0
    assert "f = 0, recompute, layer 2: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "gpu --device cpu --shape tiny --batches 3 --new-tokens 12 --prompt-tokens 9"
    command += f" --rounds 1 --acceptance 1 --out {tmp_path}/r --systems"
    systems = [gpu.CONTINUOUS, gpu.STATIC, *gpu.POLICIES]
    monkeypatch.setattr(sys, "argv", [*command.split(), *systems])
    gpu.main()
    assert gpu.CPU_WARNING in capsys.readouterr().out
    found = json.loads((tmp_path / "r").read_text())
    assert found["setup"]["warning"] == gpu.CPU_WARNING
    runs = {run["system"]: run for run in found["runs"]}
    assert list(runs) == systems
    assert all(run["tokens_per_s"][0] > 0 for run in found["runs"])
    assert "reason" not in runs[gpu.CONTINUOUS], runs[gpu.CONTINUOUS].get("reason")
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
