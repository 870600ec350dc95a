"""The report's first part: totals, speed over time, where tokens left, what that saved."""

from __future__ import annotations

from typing import Any

from eevp_batch.report.colours import ExitColour
from eevp_batch.report.figures import JobFigures
from eevp_batch.report.plots import Plot, step_plot
from eevp_batch.report.text import drift_text, duration, flops, number, percent

NO_EVENTS = (
    "Not known: _eevp/events.jsonl is not there or tells of no committed chunk, so nothing can be "
    "said over time."
)


def overview(figures: JobFigures, colours: list[ExitColour]) -> dict[str, Any]:
    """What the template needs for it."""
    rate, rows = _plots(figures)
    return {
        "tiles": _tiles(figures),
        "notices": _notices(figures),
        "rate_plot": rate,
        "rows_plot": rows,
        "no_events": NO_EVENTS,
        "exit_bars": _exit_bars(figures, colours),
        "end_bars": _end_bars(figures),
        **_savings(figures),
    }


def _tile(name: str, value: str, note: str, unit: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "unit": unit}


def _tiles(figures: JobFigures) -> list[dict[str, str]]:
    summary, totals = figures.summary, figures.summary.totals
    done, mean = totals.rows_ok + totals.rows_error, totals.mean_exit_layer
    failed = f", {number(totals.rows_error)} in error" if totals.rows_error else ", none in error"
    skipped, audit = summary.layers_skipped_fraction, summary.audit
    speed = summary.tokens_per_s
    tiles = [
        _tile(
            "Rows",
            number(done),
            number(totals.rows_ok) + " ok" + failed,
            f"of {number(summary.rows_in)}",
        ),
        _tile("Generated", number(totals.generated_tokens), _lengths(figures), "tokens"),
        _tile(
            "Speed",
            "not known" if speed is None else number(speed),
            "of the last run, loading left out" if speed else "no token has been committed so far",
            "tokens/s" if speed else "",
        ),
        _tile(
            "Mean exit layer",
            "none" if mean is None else f"{mean:.1f}",
            "no token so far" if mean is None else _layers(summary.exit_layers),
            "" if mean is None else f"of {summary.num_layers}",
        ),
        _tile(
            "Layers skipped",
            "none" if skipped is None else percent(skipped),
            _policy(figures),
        ),
    ]
    if audit is None:
        return [*tiles, _tile("Differs from full depth", "not audited", "see Quality")]
    low, high = (percent(share) for share in audit.disagreement_interval)
    differs = percent(audit.disagreement)
    return [*tiles, _tile("Differs from full depth", differs, f"{low} to {high}", "of tokens")]


def _lengths(figures: JobFigures) -> str:
    totals = figures.summary.totals
    if not totals.generations:
        return f"{number(totals.prompt_tokens)} prompt tokens"
    mean = totals.generated_tokens / totals.generations
    return f"{number(totals.generations)} generations of {mean:.0f} on average"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return "every token takes all of them"
    return (
        f"exits after {', '.join(map(str, layers))}" if len(layers) <= 6 else f"{len(layers)} exits"
    )


def _policy(figures: JobFigures) -> str:
    fields = figures.plan.fields
    if fields["exit.mode"] == "off":
        return "exits are off"
    return f"exit.kv: {fields['exit.kv']}"


def _notices(figures: JobFigures) -> list[str]:
    summary = figures.summary
    notices = []
    if summary.state != "done":
        chunks = f"{number(summary.chunks_done)} of {number(summary.chunks)}"
        notices.append(f"The job is {summary.state}: {chunks} chunks are committed.")
    if summary.learning:
        notices.append(summary.learning[0].upper() + summary.learning[1:] + ".")
    if summary.drift:
        notices.append(f"The audit warned: {drift_text(summary.drift)}.")
    return notices


def _plots(figures: JobFigures) -> tuple[Plot | None, Plot | None]:
    timeline = figures.timeline
    end_s = timeline.end_s
    if timeline.working_s is None or end_s <= 0:
        return None, None
    rates = [*timeline.tokens.rates(), (end_s, 0.0)]
    label = "Generated tokens a second over the time of running"
    rate = step_plot(label, "tokens/s", rates, end_s)
    totals = timeline.rows.running_totals()
    totals.append((end_s, totals[-1][1]))
    return rate, step_plot("Rows of committed chunks", "rows", totals, end_s)


def _exit_bars(figures: JobFigures, colours: list[ExitColour]) -> list[dict[str, Any]]:
    counts = figures.summary.totals.exit_histogram
    layers = zip(figures.summary.exit_layers, colours, strict=True)
    return _bars([(f"layer {layer}", counts[layer], colour.name) for layer, colour in layers])


def _end_bars(figures: JobFigures) -> list[dict[str, Any]]:
    reasons = sorted(figures.summary.totals.finish_reasons.items(), key=lambda item: -item[1])
    return _bars([(name, count, "plain") for name, count in reasons])


def _bars(rows: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """Bars for (name, count, colour); none where nothing was counted."""
    total, most = sum(count for _, count, _ in rows), max((n for _, n, _ in rows), default=0)
    return [
        {
            "name": name,
            "colour": colour,
            "count": number(count),
            "share": percent(count / total),
            "width": 100 * count / most,
        }
        for name, count, colour in rows
        if total
    ]


def _savings(figures: JobFigures) -> dict[str, Any]:
    found = figures.savings
    rows = [["token layers", number(found.layers_full), number(found.layers_run)]]
    rows[0].append(_saved(found.layers_full, found.layers_run))
    notes = ["A token layer is one generated token going through one layer."]
    if found.flops_run and found.flops_full:
        full, run = found.flops_full, found.flops_run
        rows.append(["FLOPs, estimated", flops(full), flops(run), _saved(full, run)])
        notes.append(
            "FLOPs are estimated from the model's shape: its matrix products over prompts and "
            "generated tokens, the check at every exit and the keys and values of skipped layers "
            "included, attention left out."
        )
    if found.seconds_saved is not None and found.working_s is not None:
        full_s = found.working_s + found.seconds_saved
        rows.append(
            [
                "seconds, estimated",
                duration(full_s),
                duration(found.working_s),
                _saved(full_s, found.working_s),
            ]
        )
        notes.append(
            "Seconds at full depth are the seconds measured here, taken to go with the FLOPs. Only "
            "a run with exit.mode: off measures them."
        )
    if found.missing:
        notes.append(f"FLOPs and seconds are {found.missing}.")
    elif found.seconds_saved is None:
        notes.append("Seconds are not estimated: the event log tells of no committed chunk.")
    return {
        "savings_head": ["", "full depth", "this job", "saved"],
        "savings_rows": rows,
        "savings_notes": notes,
    }


def _saved(full: float, run: float) -> str:
    if not full:
        return "-"
    share = 1 - run / full
    return percent(share) if share > -0.0005 else f"none: {percent(-share)} more"
