"""Whole jobs on the demo model, through Ray, chunks and Parquet, read back by pyarrow alone."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.plain_output import ERRORS, GENERATED, LEADING, Rows, columns, events, metadata, parts
from tests.plain_output import read_rows as read
from tests.real_jobs import run_in_process, write_job

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
NUM_LAYERS = 30
NUM_TOKENS = 24
CORPUS_TOKENS = 24
CORPUS_LAYERS = [20, 25, 30]
CORPUS_THRESHOLD = 0.8  # four tokens in ten leave early


# --- token for token -----------------------------------------------------------------------------


@dataclass
class Oracle:
    """What plain transformers generates.

    Attributes:
        prompts: prompt by row id.
        token_ids: the greedy continuation by row id.
        smallest_gap: the least distance between the best and the second-best score of any token;
            a gap of rounding's size (1e-4) would leave the choice to the order of summation.
    """

    prompts: dict[str, str]
    token_ids: dict[str, list[int]]
    smallest_gap: float


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path)


@pytest.fixture(scope="module")
def oracle(demo_model_path: Path, demo_tokenizer: Any) -> Oracle:
    """Greedy `generate` in float32, four prompts of one length at a time: nothing is padded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32).eval()
    end_id = model.config.eos_token_id
    prompts, token_ids, smallest_gap = {}, {}, float("inf")
    for group in prompts_by_length(demo_tokenizer, each=4):
        inputs = torch.tensor([ids for _, _, ids in group])
        with torch.inference_mode():
            found = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                output_scores=True,
                return_dict_in_generate=True,
            )
        for row, (row_id, prompt, _) in enumerate(group):
            new = found.sequences[row, inputs.shape[1] :].tolist()
            # Rows that ended before their neighbours are filled up with the end token.
            new = new[: new.index(end_id) + 1] if end_id in new else new
            prompts[row_id], token_ids[row_id] = prompt, new
            for scores in found.scores[: len(new)]:
                best = scores[row].topk(2).values
                smallest_gap = min(smallest_gap, float(best[0] - best[1]))
    return Oracle(prompts, token_ids, smallest_gap)


def prompts_by_length(tokenizer: Any, each: int) -> list[list[tuple[str, str, list[int]]]]:
    """The demo's prompts (id, text, chat token ids): 16 groups of one length, 37 to 225 tokens."""
    groups: dict[int, list[tuple[str, str, list[int]]]] = defaultdict(list)
    for path in sorted((ROOT / "jobs" / "prompts").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "prompt"]).to_pylist():
            message = {"role": "user", "content": row["prompt"]}
            ids = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
            groups[len(ids)].append((row["id"], row["prompt"], ids))
    large = [groups[length][:each] for length in sorted(groups) if len(groups[length]) >= each]
    return large[:30:2] + large[-1:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "exits",
    [
        {"mode": "off"},
        {"mode": "on", "layers": [10, 20], "threshold": 1.5},
        {"mode": "on", "layers": [10, 20, 25], "threshold": 0.6, "kv": "verify", "max_waiting": 4},
    ],
    ids=["exits off", "threshold above 1", "verify"],
)
def test_a_whole_job_equals_plain_greedy_generation(
    oracle: Oracle,
    demo_model_path: Path,
    demo_tokenizer: Any,
    tmp_path: Path,
    exits: dict[str, Any],
) -> None:
    prompts = oracle.prompts
    table = pa.table({"id": list(prompts), "prompt": list(prompts.values())})
    # Neighbours differ in length: a batch is mixed.
    order = [row for start in range(4) for row in range(start, len(prompts), 4)]
    pq.write_table(table.take(order), tmp_path / "prompts.parquet", row_group_size=10)
    job = write_job(
        tmp_path,
        {
            "input": {"path": "prompts.parquet"},
            "model": {"path": str(demo_model_path), "dtype": "float32"},
            "exit": exits,
            "sampling": {"max_new_tokens": NUM_TOKENS},
            "cluster": {"replicas": 2},
            "run": {"chunk_rows": 8},
        },
    )
    run_in_process(job)
    found = {row["row_id"]: row for row in read(tmp_path / "out")}
    assert len(prompts) == 64 and found.keys() == prompts.keys(), "every prompt comes out, once"
    assert len({row["prompt_tokens"] for row in found.values()}) == 16, "the lengths differ"
    assert len(parts(tmp_path / "out")) == 8, "the job is cut into several chunks"
    workers = {event["replica"] for event in events(tmp_path / "out", "chunk_committed")}
    assert len(workers) == 2, f"both replicas do their share, not only {workers}"
    for row_id, row in found.items():
        assert row["token_ids"] == oracle.token_ids[row_id], (
            f"row {row_id} differs from transformers; the oracle's closest choice was one of "
            f"{oracle.smallest_gap:.1e}"
        )
        if exits.get("kv") != "verify":
            assert set(row["exit_layers"]) == {NUM_LAYERS}, f"no token of row {row_id} leaves early"
        expected = demo_tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"] == expected, f"the text of row {row_id} is that of its ids"
    early = sum(layer < NUM_LAYERS for row in found.values() for layer in row["exit_layers"])
    assert (early > 200) == (exits.get("kv") == "verify"), "drafts that stand left early"


# --- what any user may rely on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus_out(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a part of the demo job; its long prompts become error rows."""
    out = tmp_path_factory.mktemp("corpus") / "out"
    changes = {
        "model.path": demo_model_path,
        "output.path": out,
        "exit.layers": CORPUS_LAYERS,
        "exit.threshold": CORPUS_THRESHOLD,
        "input.limit": 48,
        "prompt.max_prompt_tokens": 80,
        "sampling.max_new_tokens": CORPUS_TOKENS,
        "run.chunk_rows": 12,
        "run.max_error_rate": 1.0,
    }
    overrides = [f"{field}={value}" for field, value in changes.items()]
    run_in_process(ROOT / "jobs" / "corpus.yaml", overrides)
    return out


@pytest.fixture(scope="module")
def corpus_rows(corpus_out: Path) -> Rows:
    return read(corpus_out)


@pytest.mark.timeout(300)
def test_columns_and_types_are_the_designed_ones(corpus_out: Path) -> None:
    kept = dict.fromkeys(("task", "topic", "difficulty", "expected"), pa.string())
    expected = {**LEADING, **kept, **GENERATED}
    assert len(parts(corpus_out)) == 4, "one data part a chunk"
    for part in parts(corpus_out):
        found = columns(part)
        assert found == expected, f"{part.name} has the designed columns and types"
        assert list(found) == list(expected), f"{part.name} has its columns in the designed order"
    for part in parts(corpus_out, "errors"):
        assert columns(part) == ERRORS, f"the error part {part.name} is as designed"


def test_every_input_row_is_in_the_output_or_in_error(corpus_out: Path, corpus_rows: Rows) -> None:
    source = pq.read_table(ROOT / "jobs" / "prompts" / "part-0.parquet").slice(0, 48).to_pylist()
    errors = {row["row_id"]: row for row in read(corpus_out, "errors")}
    assert errors, "some prompts are too long, so that error rows are seen too"
    assert {row["error_class"] for row in errors.values()} == {"PromptTooLongError"}, (
        "an error row names the error's class"
    )
    assert [row["row_id"] for row in corpus_rows] == [
        row["id"] for row in source if row["id"] not in errors
    ], "the rows without an error come out once each, in the input's order"
    by_id = {row["id"]: row for row in source}
    for row in corpus_rows:
        for name in ("task", "topic", "difficulty", "expected"):
            assert row[name] == by_id[row["row_id"]][name], f"{name} is carried along as it is"
        assert row["sample_index"] == 0, "a row has one sample, the first"
        assert row["attempt"] == 1, "nothing was tried twice"


def test_the_lists_of_a_row_agree(corpus_rows: Rows, demo_tokenizer: Any) -> None:
    for row in corpus_rows:
        name, length = row["row_id"], row["generated_tokens"]
        lists = [row["token_ids"], row["exit_layers"], row["exit_confidences"]]
        assert [len(values) for values in lists] == [length] * 3, (
            f"row {name} has an id, an exit layer and a confidence for each generated token"
        )
        assert set(row["exit_layers"]) <= set(CORPUS_LAYERS), (
            f"row {name} leaves at the job's exits"
        )
        assert all(0 <= value <= 1 for value in row["exit_confidences"]), (
            f"the margins of row {name} are differences of probabilities"
        )
        pairs = zip(row["exit_layers"], row["exit_confidences"], strict=True)
        assert all(value > CORPUS_THRESHOLD for layer, value in pairs if layer < NUM_LAYERS), (
            f"a token of row {name} left early without the confidence for it"
        )
        text = demo_tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"] == text, f"the text of row {name} is that of its ids"
        is_ended = row["token_ids"][-1] == demo_tokenizer.eos_token_id
        reason = "eos" if is_ended else "length"
        assert row["finish_reason"] == reason, f"row {name} says why it ended"
        assert is_ended or length == CORPUS_TOKENS, f"row {name} stops early for no reason"


def test_exits_are_summed_up_truly(corpus_rows: Rows) -> None:
    layers = [layer for row in corpus_rows for layer in row["exit_layers"]]
    early = sum(layer < NUM_LAYERS for layer in layers) / len(layers)
    assert early >= 0.2, f"a fifth of the demo job's tokens leave early, not only {early:.1%}"
    for row in corpus_rows:
        mean = sum(row["exit_layers"]) / len(row["exit_layers"])
        assert row["mean_exit_layer"] == pytest.approx(mean), (
            f"mean_exit_layer of row {row['row_id']} is the mean of its list"
        )
        skipped = 1 - mean / NUM_LAYERS
        assert row["layers_skipped_fraction"] == pytest.approx(skipped, abs=1e-6), (
            f"layers_skipped_fraction of row {row['row_id']} follows from its list"
        )


def test_files_tell_where_they_come_from(corpus_out: Path) -> None:
    found = [metadata(part) for part in parts(corpus_out) + parts(corpus_out, "errors")]
    assert all(data == found[0] for data in found), "all parts tell the same"
    expected = {"format_version", "fingerprint", "model", "model_revision_or_hash", "exit_policy"}
    assert found[0].keys() == expected, "each designed key is there"
    plan = json.loads((corpus_out / "_eevp" / "plan.json").read_text())
    assert found[0]["fingerprint"] == plan["fingerprint"], "the fingerprint is the plan's"
    policy = json.loads(found[0]["exit_policy"])
    told = {name: policy[name] for name in ("layers", "threshold", "confidence", "kv")}
    assert told == {
        "layers": CORPUS_LAYERS,
        "threshold": CORPUS_THRESHOLD,
        "confidence": "margin",
        "kv": "propagate",
    }, "the exit policy is the job's"


def test_success_counts_what_the_parts_hold(corpus_out: Path, corpus_rows: Rows) -> None:
    success = json.loads((corpus_out / "_SUCCESS").read_text())
    errors = read(corpus_out, "errors")
    assert success["rows"] == {"in": 48, "ok": len(corpus_rows), "error": len(errors)}, (
        "_SUCCESS counts the rows that the parts hold"
    )
    tokens = sum(row["generated_tokens"] for row in corpus_rows)
    assert success["totals"]["generated_tokens"] == tokens, "_SUCCESS counts the tokens too"
