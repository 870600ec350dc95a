"""The report's part on quality: what the audit says, and whether confidence can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np

from eevp_batch.report.colours import ExitColour
from eevp_batch.report.figures import JobFigures
from eevp_batch.report.plots import Plot, dot_plot
from eevp_batch.report.row_sample import MAX_AUDITED, RowSample
from eevp_batch.report.text import number, percent
from eevp_batch.tune.audited import LEVEL, AuditFigures
from eevp_batch.tune.bounds import clopper_pearson

BINS, TOKENS_PER_BIN = 8, 20

_NO_AUDIT = (
    "Not known: no row was audited. With audit.full_depth_fraction: 0.02, a fiftieth of the rows "
    "is run at full depth too, and what comes of it is shown here."
)


def quality(figures: JobFigures, colours: list[ExitColour]) -> dict[str, Any]:
    """What the template needs for it."""
    audit = figures.summary.audit
    return {
        "audit_facts": _facts(audit) if audit is not None else None,
        "no_audit": _NO_AUDIT,
        "agreement_plot": _agreement(figures, colours),
        "agreement_note": _note(figures.sample),
        "no_agreement": _why_not(figures),
    }


def _facts(audit: AuditFigures) -> list[tuple[str, str]]:
    def between(share: float, interval: tuple[float, float]) -> str:
        return f"{percent(share)} ({percent(interval[0])} to {percent(interval[1])})"

    place = audit.mean_first_divergence
    low, high = audit.distance_interval
    return [
        ("Audited rows", number(audit.rows)),
        ("Tokens that differ", between(audit.disagreement, audit.disagreement_interval)),
        (
            "Rows that differ",
            between(audit.diverged / audit.rows, audit.diverged_interval)
            + f", {number(audit.diverged)} rows",
        ),
        ("First difference", "none" if place is None else f"at token {place + 1:.1f} on average"),
        ("Text distance", f"{audit.distance:.3f} ({low:.3f} to {high:.3f}), 0 equal, 1 all other"),
    ]


def _agreement(figures: JobFigures, colours: list[ExitColour]) -> Plot | None:
    sample = figures.sample
    if not sample.agrees:
        return None
    layers = np.asarray(sample.layers)
    confidences, agrees = np.asarray(sample.confidences), np.asarray(sample.agrees)
    series = []
    for place, (layer, colour) in enumerate(zip(sample.exit_layers, colours, strict=True)):
        own = layers == place
        if own.any():
            dots = agreement_bins(confidences[own], agrees[own])
            series.append((f"layer {layer}", colour.name, dots))
    return dot_plot("Agreement with full depth by confidence, for each exit layer", series)


def agreement_bins(confidences: Any, agrees: Any) -> list[dict[str, Any]]:
    """Bins of about as many tokens each, by confidence.

    Args:
        confidences: [N] floats, N >= 1.
        agrees: [N] booleans.
    """
    order = np.argsort(confidences, kind="stable")
    count = min(BINS, max(1, len(order) // TOKENS_PER_BIN))
    bins = []
    for places in np.array_split(order, count):
        some, same = confidences[places], int(agrees[places].sum())
        bins.append(
            {
                "confidence": float(some.mean()),
                "low": float(some.min()),
                "high": float(some.max()),
                "tokens": len(places),
                "agreement": same / len(places),
                "interval": clopper_pearson(same, len(places), LEVEL),
            }
        )
    return bins


def _note(sample: RowSample) -> str:
    limit = f" (the first {number(MAX_AUDITED)})" if sample.audited >= MAX_AUDITED else ""
    return (
        f"{number(len(sample.agrees))} tokens of {number(sample.audited)} audited rows{limit} among"
        " those looked at, each up to its first difference from full depth. Every dot stands for "
        f"about as many tokens of its layer; its line is the 95 % interval. On the dashed curve "
        "confidence would be the probability of agreeing. The scale is stretched towards 1."
    )


def _why_not(figures: JobFigures) -> str:
    if figures.summary.audit is None:
        return _NO_AUDIT
    if not figures.sample.has_exits:
        return "Not known: output.token_stats is false, so confidences were not written."
    return "Not known: no audited row is among the rows that were looked at."
