"""The dataset card of an output: README.md with the Hugging Face hub's front matter.

It is meant to be published with the data, so it names no path of this machine. What is not known,
such as a licence, is left out and said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eevp_batch.report.figures import JobFigures
from eevp_batch.report.text import number, percent

MARK = "<!-- Written by eevp-batch report. Delete this line, and it will not be written again. -->"

SNIPPETS = {
    "pyarrow": """\
import pyarrow.dataset

table = pyarrow.dataset.dataset("data", format="parquet").to_table()
print(table.num_rows, table.column("text")[0])
""",
    "datasets": """\
import os

from datasets import load_dataset

rows = load_dataset(os.getcwd(), split="train")  # or the dataset's id on the hub
print(rows.num_rows, rows[0]["text"])
""",
    "pandas": """\
import pandas

rows = pandas.read_parquet("data")
print(len(rows), rows["text"][0])
""",
    "duckdb": """\
import duckdb

print(duckdb.sql(\"\"\"
    SELECT finish_reason, count(*) AS generations, avg(mean_exit_layer) AS mean_exit_layer
    FROM 'data/*.parquet' GROUP BY finish_reason ORDER BY generations DESC
\"\"\"))
""",
}
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_MEANINGS = {
    "row_id": "id of the prompt",
    "sample_index": "which of the prompt's generations, from 0",
    "prompt_tokens": "tokens of the prompt, the chat template's included",
    "generated_tokens": "tokens, the end token included",
    "text": "the generation, without special tokens",
    "finish_reason": "`eos`, `stop` (a stop string) or `length`",
    "token_ids": "the generated tokens",
    "exit_layers": "for each token, the layer it left the model after",
    "exit_confidences": "for each token, the confidence it left with",
    "mean_exit_layer": "mean over the tokens",
    "layers_skipped_fraction": "share of (tokens x layers) that was skipped",
    "seed": "seed of the generation's random draws",
    "chunk_id": "number of the part",
    "attempt": "how often the part had been started when it was written",
    "phase": "`exits`, or `full` where the part was run without",
    "audit_token_ids": "what the whole model generates for the same prompt; null where not audited",
    "audit_first_divergence": "position of the first token that differs from it, from 0",
    "audit_distance": "edit distance to it, 0 to 1",
}
_CAVEATS = {
    "verify": "The last layer judged every token that left early, so the output is distributed as "
    "the whole model's; with greedy decoding it is the same but for rounding.",
    "other": "Tokens that leave early may differ from those of the whole model, and so may what "
    "follows them.",
}


def render_card(figures: JobFigures, columns: list[tuple[str, str]]) -> str:
    """The card as Markdown.

    Args:
        figures: the job.
        columns: name and type of each column of the data; none before there is data.
    """
    front = yaml.safe_dump(_front_matter(figures), sort_keys=False, allow_unicode=True)
    blocks = [
        f"---\n{front}---\n\n# {_title(figures)}",
        _opening(figures),
        "## How it was made",
        "\n".join(f"- **{name}**: {text}" for name, text in _facts(figures)),
        _honesty(figures),
        "## Columns",
        _columns(figures, columns),
        "## Loading",
        "In this folder:",
        *(f"```python\n{code}```" for code in SNIPPETS.values()),
        MARK,
    ]
    return "\n\n".join(blocks) + "\n"


def is_ours(text: str) -> bool:
    """Whether a README.md was written here, so that it may be written again."""
    return MARK in text


def _front_matter(figures: JobFigures) -> dict[str, Any]:
    configs = [_config("default", "data")]
    if figures.chunks.error_parts:
        configs.append(_config("errors", "errors"))
    count = figures.summary.totals.generations
    smaller = [size for place, size in enumerate(_SIZES) if count >= 10 ** (place + 3)]
    size = "n<1K"
    if smaller:
        place = _SIZES.index(smaller[-1])
        size = (
            f"n>{smaller[-1]}"
            if place + 1 == len(_SIZES)
            else f"{smaller[-1]}<n<{_SIZES[place + 1]}"
        )
    return {
        "pretty_name": _title(figures),
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "early-exit", "eevp-batch"],
        "size_categories": [size],
        "configs": configs,
    }


def _config(name: str, folder: str) -> dict[str, Any]:
    files = [{"split": "train", "path": f"{folder}/*.parquet"}]
    return {"config_name": name, "data_files": files}


def _title(figures: JobFigures) -> str:
    return figures.summary.run_id.rpartition("-")[0]


def _opening(figures: JobFigures) -> str:
    summary, totals = figures.summary, figures.summary.totals
    version = figures.success.get("run", {}).get("eevp_batch", "")
    text = (
        f"{number(totals.generations)} generations ({number(totals.generated_tokens)} tokens) for "
        f"{number(totals.rows_ok)} prompts, made by {_model(figures)} with "
        f"{f'eevp-batch {version}'.strip()}."
    )
    if summary.state != "done":
        text += (
            f" The job is **{summary.state}**: {number(totals.rows)} of {number(summary.rows_in)} "
            "rows are here."
        )
    if totals.rows_error:
        classes = sorted(totals.error_classes.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{name} {number(count)}" for name, count in classes)
        text += (
            f" {number(totals.rows_error)} of {number(totals.rows)} prompts could not be done "
            f"({named}); they are in `errors/`, with the reason."
        )
    return text


def _model(figures: JobFigures) -> str:
    """The model's hub id, or the name of its folder without the way to it."""
    model = figures.summary.model
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return f"`{model if is_hub_id else Path(model).name}`"


def _facts(figures: JobFigures) -> list[tuple[str, str]]:
    fields, summary = figures.plan.fields, figures.summary
    found = [
        ("Model", f"{_model(figures)}, {fields['model.dtype']}"),
        ("Revision or content hash", f"`{figures.plan.model_revision_or_hash}`"),
    ]
    if fields["exit.mode"] == "off":
        found.append(("Exits", f"none; every token went through all {summary.num_layers} layers"))
    else:
        found += _exit_facts(figures)
    temperature = fields["sampling.temperature"]
    sampling = (
        f"temperature {temperature}, top_p {fields['sampling.top_p']}" if temperature else "greedy"
    )
    sampling += f", at most {number(fields['sampling.max_new_tokens'])} new tokens"
    sampling += (
        f", {figures.plan.num_samples} generation(s) a prompt, seed {fields['sampling.seed']}"
    )
    found.append(("Sampling", sampling))
    reasons = sorted(summary.totals.finish_reasons.items(), key=lambda item: (-item[1], item[0]))
    if reasons:
        found.append(("Ended by", ", ".join(f"{name} {number(count)}" for name, count in reasons)))
    return [*found, ("Job fingerprint", f"`{figures.plan.fingerprint}`")]


def _exit_facts(figures: JobFigures) -> list[tuple[str, str]]:
    fields, summary = figures.plan.fields, figures.summary
    layers = ", ".join(map(str, summary.exit_layers))
    found = [("Exits", f"after layers {layers} of {summary.num_layers}")]
    if fields["exit.mode"] == "on":
        found.append(("Threshold", f"{fields['exit.threshold']} of `{fields['exit.confidence']}`"))
    else:
        found.append(("Threshold", summary.learning or "learned by the job itself"))
    top_k = fields["exit.vocab.top_k"]
    pruned = "not pruned" if top_k is None else f"pruned to {number(top_k)} ids at the first exit"
    found.append(("Vocabulary", pruned))
    found.append(("KV policy", f"`{fields['exit.kv']}`"))
    mean, skipped = summary.totals.mean_exit_layer, summary.layers_skipped_fraction
    if mean is not None and skipped is not None:
        found.append(("Mean exit layer", f"{mean:.2f}, {percent(skipped)} of all layers skipped"))
    return found


def _honesty(figures: JobFigures) -> str:
    fields, audit = figures.plan.fields, figures.summary.audit
    lines = ["The text is a model's: nobody has checked it, and it may be wrong."]
    if fields["exit.mode"] != "off":
        lines.append(_CAVEATS.get(fields["exit.kv"], _CAVEATS["other"]))
        if audit is None:
            lines.append("How far the text is from that was not measured: the job audited no row.")
        else:
            low, high = (percent(share) for share in audit.disagreement_interval)
            lines.append(
                f"{number(audit.rows)} rows were run at full depth too: "
                f"{percent(audit.disagreement)} of the tokens differ ({low} to {high} with 95 % "
                f"confidence), and {percent(audit.diverged / audit.rows)} of the rows come out "
                "otherwise."
            )
    lines.append(
        "No licence is stated here: it depends on the prompts and on the terms of the model."
    )
    return " ".join(lines)


def _columns(figures: JobFigures, columns: list[tuple[str, str]]) -> str:
    if not columns:
        return "There is no data so far."
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for name, kind in columns:
        meaning = "from the input" if name in figures.plan.kept_columns else _MEANINGS.get(name, "")
        lines.append(f"| {_cell(name)} | {_cell(kind)} | {meaning} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text as code in a table's cell."""
    escaped = text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
    return f"`{escaped}`"
