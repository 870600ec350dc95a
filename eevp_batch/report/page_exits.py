"""The report's part on exits: by position, token class and column, of the rows looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eevp_batch.report.colours import ExitColour
from eevp_batch.report.figures import JobFigures
from eevp_batch.report.plots import Plot, stacked_plot
from eevp_batch.report.row_sample import MAX_POSITIONS, MAX_VALUES, SEED, RowSample
from eevp_batch.report.text import number, percent
from eevp_batch.report.vocabulary import CLASSES

_LABEL_LENGTH = 60


def exits(figures: JobFigures, colours: list[ExitColour]) -> dict[str, Any]:
    """What the template needs for it."""
    sample, layers = figures.sample, figures.summary.exit_layers
    names = [f"layer {layer}" for layer in layers]
    return {
        "sampled": sampled(sample),
        "layer_legend": [(colour.name, name) for colour, name in zip(colours, names, strict=True)],
        "position_plot": _positions(sample, names, colours),
        "no_exits": _no_exits(figures),
        "class_rows": _classes(sample, names, colours),
        "no_classes": _no_classes(figures),
        "column_tables": [
            {
                "name": column,
                "has_exits": sample.has_exits and len(layers) > 1,
                "rows": [
                    _group(
                        value, group.rows, group.tokens, group.mean_exit_layer, group.exits, names
                    )
                    for value, group in groups.items()
                ],
            }
            for column, groups in sample.by_column.items()
        ],
        "column_note": _column_note(figures),
        "recall_facts": _recall(figures),
        "no_recall": _no_recall(figures),
    }


def sampled(sample: RowSample) -> str:
    """What was looked at, in a sentence."""
    if not sample.rows:
        return "There are no finished generations to look at so far."
    looked = f"{number(sample.rows)} generations with {number(sample.tokens)} tokens"
    if sample.parts == sample.parts_total:
        return f"From every finished generation: {looked}."
    return (
        f"From a sample: {looked}, which are the rows of {number(sample.parts)} of "
        f"{number(sample.parts_total)} parts, drawn at random (seed {SEED})."
    )


def _positions(sample: RowSample, names: list[str], colours: list[ExitColour]) -> Plot | None:
    counts = sample.by_position[:MAX_POSITIONS]
    used = int(np.flatnonzero(counts.sum(axis=1)).max(initial=-1)) + 1
    if not sample.has_exits or not used or len(names) == 1:
        return None
    return stacked_plot(
        "Share of tokens by exit layer and position in the generation",
        "position in the generation, in tokens",
        counts[:used],
        names,
        [colour.name for colour in colours],
    )


def _classes(
    sample: RowSample, names: list[str], colours: list[ExitColour]
) -> list[dict[str, Any]]:
    if sample.by_class is None or len(names) == 1:
        return []
    layers = np.asarray(sample.exit_layers)
    rows = []
    for name, counts in zip(CLASSES, sample.by_class, strict=True):
        tokens = int(counts.sum())
        if tokens:
            mean = float(counts @ layers) / tokens
            rows.append(_group(name, None, tokens, mean, counts, names))
    return rows


def _group(
    name: str,
    rows: int | None,
    tokens: int,
    mean: float | None,
    counts: npt.NDArray[np.int64] | None,
    names: list[str],
) -> dict[str, Any]:
    parts, label = [], ""
    if counts is not None and tokens and len(names) > 1:
        shares = [(k, count / tokens) for k, count in enumerate(counts.tolist()) if count]
        parts = [
            {"colour": f"x{k}", "width": 100 * share, "tip": f"{percent(share)} {names[k]}"}
            for k, share in shares
        ]
        label = ", ".join(part["tip"] for part in parts)
    return {
        "name": name if len(name) <= _LABEL_LENGTH else name[:_LABEL_LENGTH] + "...",
        "rows": "" if rows is None else number(rows),
        "tokens": number(tokens),
        "mean": "-" if mean is None else f"{mean:.1f}",
        "parts": parts,
        "label": label,
    }


def _no_exits(figures: JobFigures) -> str:
    summary = figures.summary
    if len(summary.exit_layers) == 1 and summary.totals.generated_tokens:
        return f"There is nothing to tell apart: every token took all {summary.num_layers} layers."
    return "Not known: the job has output.token_stats: false, or no token so far."


def _no_classes(figures: JobFigures) -> str:
    if not figures.sample.has_exits or len(figures.summary.exit_layers) == 1:
        return _no_exits(figures)
    return (
        "Not known: the model's tokenizer.json is not at hand any more, or the model's folder is "
        "not what it was."
    )


def _recall(figures: JobFigures) -> list[tuple[str, str]]:
    """K recall, where tokens of the last layer were chosen from the whole vocabulary."""
    kept, fields = figures.summary.totals.kept, figures.plan.fields
    if kept.recall is None:
        return []
    return [
        ("K", number(fields["exit.vocab.top_k"])),
        ("Cut after layer", str(fields["exit.vocab.prune_layer"])),
        ("Tokens of the last layer", number(kept.tokens)),
        ("Among the ids kept", f"{percent(kept.recall)} (recall)"),
    ]


def _no_recall(figures: JobFigures) -> str:
    fields = figures.plan.fields
    if fields["exit.mode"] == "off" or fields["exit.vocab.top_k"] is None:
        return "There is nothing to recall: the job does not cut the vocabulary."
    if fields["exit.vocab.final_head"] != "full":
        return (
            "Not known: with exit.vocab.final_head: pruned no token is chosen from the whole "
            "vocabulary; eevp-batch potential measures recall, layer by layer."
        )
    return "Not known: no token went through the last layer so far, or it was not recorded."


def _column_note(figures: JobFigures) -> str:
    sample, kept = figures.sample, figures.plan.kept_columns
    if not kept:
        return "The job keeps no column of its input (input.keep_columns) to group by."
    if sample.many_valued:
        return (
            f"Not shown by {', '.join(sample.many_valued)}: more than {MAX_VALUES} values, or a "
            "type other than text, integer or boolean."
        )
    return ""
