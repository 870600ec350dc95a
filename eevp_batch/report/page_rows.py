"""The report's parts on single rows: errors, the slowest and longest ones, samples to read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from eevp_batch.report.figures import JobFigures
from eevp_batch.report.row_sample import SEED
from eevp_batch.report.text import number
from eevp_batch.row_counts import SlowRow

MAX_SHOWN_TOKENS = 1024
MAX_SHOWN_CHARACTERS = 8_000
_MESSAGE_LENGTH = 600


def rows(figures: JobFigures) -> dict[str, Any]:
    """What the template needs for them."""
    samples = [_sample(figures, row) for row in figures.sample.shown]
    has_tokens = any(sample["pieces"] for sample in samples)
    return {
        "errors": _errors(figures),
        "longest_head": ["row", "ended by", "generated tokens", "prompt tokens", "mean exit layer"],
        "longest": [_longest(row) for row in figures.sample.longest],
        "slow_head": ["row", "seconds", "generated tokens", "tokens/s"],
        "slow_rows": [_slow(row) for row in figures.summary.totals.slowest],
        "samples": samples,
        "samples_have_tokens": has_tokens,
        "samples_lead": f"{number(len(samples))} generations, drawn at random (seed {SEED}) from "
        "those that were looked at.",
        "samples_help": _help(figures, has_tokens),
    }


def _errors(figures: JobFigures) -> list[dict[str, Any]]:
    counts = figures.summary.totals.error_classes
    groups = []
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        some = figures.errors.get(name, [])
        table = [
            [str(row["row_id"]), _cut(row["message"] or "", _MESSAGE_LENGTH), str(row["attempts"]),
             str(row["chunk_id"])]
            for row in some
        ]  # fmt: skip
        note = f"{len(some)} of {number(count)} rows." if len(some) < count else ""
        plural = "row" if count == 1 else "rows"
        groups.append(
            {"name": name, "count": f"{number(count)} {plural}", "rows": table, "note": note}
        )
    return groups


def _longest(row: dict[str, Any]) -> list[str]:
    mean = row["mean_exit_layer"]
    return [
        _name(row),
        str(row["finish_reason"]),
        number(row["generated_tokens"]),
        number(row["prompt_tokens"]),
        "-" if mean is None else f"{mean:.1f}",
    ]


def _slow(row: SlowRow) -> list[str]:
    rate = f"{row.generated_tokens / row.seconds:,.1f}" if row.seconds > 0 else "-"
    return [_name(asdict(row)), f"{row.seconds:,.2f}", number(row.generated_tokens), rate]


def _name(row: dict[str, Any]) -> str:
    index = row["sample_index"]
    return str(row["row_id"]) + (f", sample {index}" if index else "")


def _sample(figures: JobFigures, row: dict[str, Any]) -> dict[str, Any]:
    """A generation for the page's script; pieces are None where tokens are not told apart."""
    mean, prompt = row["mean_exit_layer"], figures.prompts.get(row["row_id"])
    facts = [f"{number(row['generated_tokens'])} tokens", f"ended by {row['finish_reason']}"]
    facts.append(f"prompt of {number(row['prompt_tokens'])} tokens")
    if mean is not None:
        facts.append(f"mean exit layer {mean:.1f} of {figures.summary.num_layers}")
    if row.get("audit_token_ids") is not None:
        first = row["audit_first_divergence"]
        same = (
            "as at full depth" if first is None else f"differs from full depth at token {first + 1}"
        )
        facts.append(f"audited: {same}")
    sample: dict[str, Any] = {
        "title": f"{_name(row)} ({number(row['generated_tokens'])} tokens)",
        "facts": ", ".join(facts),
        "prompt": None if prompt is None else _cut(prompt, MAX_SHOWN_CHARACTERS),
        "text": _cut(row["text"] or "", MAX_SHOWN_CHARACTERS),
        "pieces": None,
    }
    if figures.vocabulary is None or row.get("exit_layers") is None:
        return sample
    ids = row["token_ids"][:MAX_SHOWN_TOKENS]
    layers = np.searchsorted(figures.sample.exit_layers, row["exit_layers"][: len(ids)])
    if len(ids) < len(row["token_ids"]):
        sample["facts"] += f"; the first {number(len(ids))} tokens are shown"
    return {
        **sample,
        "pieces": figures.vocabulary.pieces(ids),
        "exits": layers.tolist(),
        "confidences": [round(value, 5) for value in row["exit_confidences"][: len(ids)]],
    }


def _help(figures: JobFigures, has_tokens: bool) -> str:
    if has_tokens:
        return (
            "Colour is the layer that a token left after. Point at a token, or focus the text and "
            "use the arrow keys, for its layer and confidence."
        )
    if not figures.sample.has_exits:
        return "Tokens are not coloured: the job has output.token_stats: false."
    return "Tokens are not coloured: the model's tokenizer.json is not at hand any more."


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " ..."
