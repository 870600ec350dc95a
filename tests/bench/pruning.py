"""What confidence costs per token, and what each proposal of the kept ids costs and recalls.

    python -m tests.bench.pruning --out result.json

States are the model's own, at the tokens of its greedy answers to the throughput benchmark's
prompts. The first table times the engine's `ExitRule` at every exit before the last: scores of the
whole vocabulary at each, against K kept ids with the cut at the first exit charged. The second
compares proposals at one exit layer: cost of proposing, cutting and rescoring, and how often the
best id of that layer, and the token that the last layer chooses, is among the K kept. Everything is
timed in turn within one process; columns are the fastest and the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eevp_batch.engine.exits import ExitRule
from eevp_batch.engine.fused import FusedLayers
from eevp_batch.engine.host_memory import keep_freed_memory
from eevp_batch.engine.proposals import Proposal, make_proposal
from eevp_batch.engine.pruned_vocab import prune, pruned_scores
from eevp_batch.engine.segmented_model import SegmentedModel, SegmentOutput
from eevp_batch.engine.sequence import ScoredTokens
from eevp_batch.spec import ExitSpec, SamplingSpec, VocabSpec
from tests.bench.machine import setup, write_json
from tests.bench.prompts import throughput_prompts

EXITS = {1: [10], 3: [10, 15, 20], 6: [10, 13, 16, 19, 22, 25]}
KEPT = (64, 256, 1024)
PROPOSALS: dict[str, dict[str, Any]] = {
    "full": {},
    "int8": {"proposal": "int8"},
    **{f"low_rank {rank}": {"proposal": "low_rank", "rank": rank} for rank in (64, 128, 256)},
}
States = dict[int, torch.Tensor]


@torch.inference_mode()
def answer_states(model: PreTrainedModel, path: str, num_prompts: int, new_tokens: int) -> States:
    """Hidden states [N, E] after each layer, where greedy answers to the prompts were chosen.

    The last layer's come normed, as transformers gives them.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in throughput_prompts()[:: 192 // num_prompts][:num_prompts]
    ]
    given = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    start = given["input_ids"].shape[1]
    mask = torch.cat([given["attention_mask"], torch.ones_like(ids[:, start:])], dim=1)
    found = model.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return {
        layer: states[:, start - 1 : -1].flatten(0, 1).clone() for layer, states in enumerate(found)
    }


def in_turn(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def confidence_task(
    model: SegmentedModel, states: States, vocab: VocabSpec, proposal: Proposal | None, rows: int
) -> Callable[[], object]:
    """Decide once for `rows` tokens at every exit before the last."""
    spec = ExitSpec(layers=list(model.exit_layers), threshold=0.9, vocab=vocab)
    prune_layer = None if vocab.top_k is None else model.exit_layers[0]
    rule = ExitRule(
        model, model.exit_layers, prune_layer, spec, SamplingSpec(), [2], rows, rows, proposal
    )
    nothing: list[Any] = [0] * rows
    tokens = ScoredTokens(
        list(range(rows)), nothing, nothing, [True] * rows, [[]] * rows, [None] * rows
    )
    dtype = torch.float32 if isinstance(model.layers, FusedLayers) else model.dtype
    exits = [
        SegmentOutput(states[layer][:rows].to(dtype), states[layer - 1][:rows].to(dtype))
        for layer in model.exit_layers[:-1]
    ]

    def decide() -> None:
        for depth, state in enumerate(exits):
            rule.decide(depth, state, tokens)

    return torch.inference_mode()(decide)


def confidence_costs(
    weights: PreTrainedModel,
    states: States,
    proposals: dict[str, Proposal | None],
    chosen: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Microseconds per token of all exits together, by number of exits and vocabulary."""
    rows = []
    last = weights.config.num_hidden_layers
    for count, layers in EXITS.items():
        model = SegmentedModel(weights, [*layers, last])
        whole = VocabSpec(top_k=None)
        tasks = {"whole vocabulary": confidence_task(model, states, whole, None, chosen.rows)}
        for k in KEPT:
            for name, proposal in proposals.items():
                vocab = VocabSpec(top_k=k, **PROPOSALS[name])
                task = confidence_task(model, states, vocab, proposal, chosen.rows)
                tasks[f"K = {k}, {name}"] = task
        for name, seconds in in_turn(tasks, chosen.rounds).items():
            rows.append({"exits": count, "vocabulary": name, **summary(seconds, chosen.rows)})
    return rows


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
    """Fastest and median microseconds per token."""
    return {
        "fastest_us": round(1e6 * min(seconds) / tokens, 2),
        "median_us": round(1e6 * statistics.median(seconds) / tokens, 2),
    }


@torch.inference_mode()
def proposal_figures(
    weights: PreTrainedModel,
    states: States,
    proposals: dict[str, Proposal | None],
    chosen: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Cost and recall of every proposal and K at the first exit layer."""
    model = SegmentedModel(weights, [EXITS[1][0], weights.config.num_hidden_layers])
    weight, always = model.head_weight, torch.tensor([2])
    normed = weights.model.norm(states[EXITS[1][0]])
    own = (normed @ weight.T).argmax(-1)
    final = (states[weights.config.num_hidden_layers] @ weight.T).argmax(-1)
    few, rows = normed[: chosen.rows].contiguous(), []
    tasks: dict[str, Callable[[], object]] = {}
    for name, proposal in proposals.items():
        propose = proposal or model.scores
        tasks[f"{name}, propose"] = lambda propose=propose: propose(few)
        for k in KEPT:
            proposed = propose(few)
            ids = prune(proposed, k, always)[0].ids
            tasks[f"{name}, cut to {k}"] = lambda s=proposed, k=k: prune(s, k, always)
            tasks[f"{name}, rescore {k}"] = lambda ids=ids: pruned_scores(few, weight, ids)
    times = {
        name: summary(took, chosen.rows) for name, took in in_turn(tasks, chosen.rounds).items()
    }
    for name, proposal in proposals.items():
        for k in KEPT:
            kept = torch.cat(
                [
                    prune((proposal or model.scores)(part), k, always)[0].ids
                    for part in torch.split(normed, 256)
                ]
            )
            parts = {"propose_us": "propose", "cut_us": f"cut to {k}", "rescore_us": f"rescore {k}"}
            cost = {key: times[f"{name}, {part}"]["fastest_us"] for key, part in parts.items()}
            if proposal is None:
                cost["rescore_us"] = 0.0
            recall = {
                f"recall_{of}": round(float((kept == best[:, None]).any(-1).double().mean()), 4)
                for of, best in (("own", own), ("final", final))
            }
            rows.append({"proposal": name, "k": k, **cost, **recall})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main() -> None:
    """Collect states, time, print, write."""
    parser = argparse.ArgumentParser(description="What confidence costs, and what is kept.")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=64, help="tokens per decision")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    weights = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16).eval()
    states = answer_states(weights, chosen.model, chosen.prompts, chosen.new_tokens)
    proposals, fit_s = {}, {}
    for name, settings in PROPOSALS.items():
        started = time.perf_counter()
        proposals[name] = make_proposal(weights, VocabSpec(**settings), EXITS[1][0])
        fit_s[name] = round(time.perf_counter() - started, 2)
    compared = proposal_figures(weights, states, proposals, chosen)
    print(f"after layer {EXITS[1][0]}, {len(states[0])} tokens; microseconds per token\n")
    print(table(compared))
    costs = confidence_costs(weights, states, proposals, chosen)
    print(f"\nconfidence at all exits before the last, {chosen.rows} tokens at a time\n")
    print(table(costs))
    if chosen.out:
        found = {"setup": setup() | {"threads": chosen.threads, "model": chosen.model}}
        found |= {"layer": EXITS[1][0], "fit_s": fit_s, "num_tokens": len(states[0])}
        write_json(chosen.out, found | {"proposals": compared, "confidence": costs})


if __name__ == "__main__":
    main()
