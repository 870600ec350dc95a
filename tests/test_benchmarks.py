"""The benchmarks run, and their result files hold what they promise; no figure is judged."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import forced_trace, gpu, guarantee, throughput
from tests.bench.quality import Judge, agreement
from tests.bench.systems import load_transformers, setting_of, with_batches

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


def test_the_ideal_counts_what_a_token_needs() -> None:
    costs = forced_trace.Costs(num_layers=30, layer=10.0, head=80.0, projection=1.0)
    assert costs.full() == 380
    assert costs.with_exit(10, 0.0, "propagate", "full") == 380 + 80, "the check is charged"
    assert costs.with_exit(10, 1.0, "propagate", "full") == 100 + 80 + 20
    assert costs.with_exit(10, 1.0, "recompute", "pruned") == 380
    assert costs.with_exit(10, 0.5, "propagate", "pruned") == 100 + 80 + 0.5 * 200 + 0.5 * 20


@pytest.mark.slow
def test_a_forced_trace_decides_who_leaves(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    overruled = {(row["fraction"], row["policy"]): row["share_overruled"] for row in found["naive"]}
    assert overruled[0.5, "grouped"] == 0 < overruled[0.5, "slowest waits"]


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "gpu --device cpu --shape tiny --batches 3 --new-tokens 6 --prompt-tokens 9"
    monkeypatch.setattr(
        sys,
        "argv",
        [*command.split(), "--rounds", "1", "--out", f"{tmp_path}/r", "--systems", *gpu.POLICIES],
    )
    gpu.main()
    found = json.loads((tmp_path / "r").read_text())
    assert [run["system"] for run in found["runs"]] == [*gpu.POLICIES]
    assert all(run["tokens_per_s"][0] > 0 for run in found["runs"])


def test_guarantee_keeps_an_outcome_of_every_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"guarantee --repetitions 3 --rows 50 --delta 0.1 --out {tmp_path}/g.json"
    monkeypatch.setattr(sys, "argv", command.split())
    guarantee.main()
    found = json.loads((tmp_path / "g.json").read_text())
    assert found["setup"]["repetitions"] == 3
    kinds = {(row["world"], row["path"], row["certifier"]) for row in found["outcomes"]}
    assert len(kinds) == len(guarantee.WORLDS) * len(guarantee.PATHS) * len(guarantee.CERTIFIERS)
    assert all(0 <= row["violations"] <= 3 for row in found["outcomes"])
