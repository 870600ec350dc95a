"""Reports as plain text for a terminal: no colour, bars of block characters, a given width."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from eevp_batch.report.forecast import Forecast
from eevp_batch.report.scaling import Prediction
from eevp_batch.report.summary import JobSummary, Sample
from eevp_batch.row_counts import SlowRow
from eevp_batch.storage.status import Status
from eevp_batch.tune.audited import AuditFigures, audit_figures

_EIGHTHS = " ▏▎▍▌▋▊▉"
_SAMPLE_LINES = 4
_SLOW_LINES = 5
_LABEL_WIDTH = 16


def render_summary(summary: JobSummary, width: int) -> str:
    """A job's summary.

    Args:
        summary: the job.
        width: columns of the terminal.
    """
    totals, skipped = summary.totals, summary.layers_skipped_fraction
    facts = {
        "rows": _rows(summary.rows_in, totals.rows_ok, totals.rows_error),
        "chunks": None if summary.state == "done" else f"{summary.chunks_done} of {summary.chunks}",
        "generations": number(totals.generations),
        "tokens": f"{number(totals.prompt_tokens)} prompt, "
        f"{number(totals.generated_tokens)} generated",
        "speed": summary.tokens_per_s and f"{number(summary.tokens_per_s)} tokens/s",
        "mean exit layer": totals.mean_exit_layer
        and f"{totals.mean_exit_layer:.2f} of {summary.num_layers}",
        "layers skipped": None if skipped is None else percent(skipped),
        "K recall": totals.kept.tokens and recall(summary),
        "ended by": _counts(totals.finish_reasons),
        "errors": _counts(totals.error_classes),
        "learning": summary.learning,
        "audit": summary.audit and _audit(summary.audit),
        "drift": summary.drift and drift_text(summary.drift),
    }
    blocks = [f"{summary.run_id}: {_state(summary.state, summary.reason)}\n{_facts(facts)}"]
    if totals.exit_histogram:
        layers = {f"layer {e}": totals.exit_histogram[e] for e in summary.exit_layers}
        blocks.append("tokens by exit layer\n" + histogram(layers, width))
    if totals.slowest:
        blocks.append("slowest rows\n" + _slowest(totals.slowest))
    if summary.samples:
        lines = [_sample(sample, width) for sample in summary.samples]
        blocks.append("sample generations\n" + "\n".join(lines))
    blocks.append("written\n" + "\n".join(f"  {path}" for path in summary.written))
    return "\n\n".join(blocks)


def render_status(status: Status, width: int, now_unix_s: float) -> str:
    """How far a job is, with a bar.

    Args:
        status: one look at the job.
        width: columns of the terminal.
        now_unix_s: the time now.
    """
    done = status.rows_done / status.rows_total if status.rows_total else 1.0
    gauge = f"  {bar(done, min(width - 12, 60), '░')} {percent(done)}"
    facts = _facts(status_facts(status, now_unix_s))
    return f"{status.run_id}: {_state(status.state, status.reason)}\n{gauge}\n{facts}"


def status_facts(status: Status, now_unix_s: float) -> dict[str, Any]:
    """What there is to say of a job's progress, by label.

    Args:
        status: one look at the job.
        now_unix_s: the time now.
    """
    totals, last = status.totals, status.last_progress_unix_s
    figures = audit_figures(totals.audit)
    left = None
    if status.state == "running" and status.tokens_per_s and totals.generated_tokens:
        tokens_left = totals.generated_tokens * (status.rows_total / status.rows_done - 1)
        left = duration(tokens_left / status.tokens_per_s)
    facts = {
        "rows": _rows(status.rows_total, totals.rows_ok, totals.rows_error),
        "chunks": f"{status.chunks_done} of {status.chunks_total}",
        "tokens": f"{number(totals.generated_tokens)} generated",
        "speed": status.tokens_per_s and f"{number(status.tokens_per_s)} tokens/s",
        "mean exit layer": totals.mean_exit_layer and f"{totals.mean_exit_layer:.2f}",
        "learning": status.learning,
        "audit": figures and _audit(figures),
        "drift": status.drift and drift_text(status.drift),
        "last progress": last and f"{duration(max(0.0, now_unix_s - last))} ago",
        "time left": left,
    }
    return {label: value for label, value in facts.items() if value}


def render_forecast(forecast: Forecast, width: int) -> str:
    """What a job will cost.

    Args:
        forecast: the job's cost.
        width: columns of the terminal.
    """
    counts = forecast.counts
    looked = f" (from {number(counts.rows)} rows looked at)" if counts.rows < forecast.rows else ""
    exits = forecast.flops_least < forecast.flops_most
    generated = (f"{flops(forecast.flops_least)} to " if exits else "") + flops(forecast.flops_most)
    facts = {
        "rows": f"{number(forecast.rows)} in {forecast.files} file(s)",
        "chunks": number(forecast.chunks),
        "prompt tokens": number(forecast.prompt_tokens) + looked,
        "new tokens": f"at most {number(forecast.max_generated_tokens)}",
        "over-long rows": f"{number(counts.overlong)}, over {number(counts.max_tokens)} tokens"
        + looked,
        "rows in error": _counts(counts.failures) + looked if counts.failures else "",
        "keys and values": f"{size(forecast.kv_bytes_per_token)} per token, "
        f"{size(forecast.kv_bytes_per_sequence)} for the longest row",
        "per new token": f"{flops(forecast.flops_per_token_least)} to "
        f"{flops(forecast.flops_per_token_most)} without attention"
        if exits
        else f"{flops(forecast.flops_per_token_most)} without attention",
        "prompts": flops(forecast.flops_prompts),
        "generation": f"at most {generated}"
        + (" (every token leaves first, to none leaves early)" if exits else ""),
    }
    blocks = [_facts(facts)]
    if counts.lengths:
        blocks.append("rows by prompt tokens\n" + histogram(counts.buckets, width))
    return "\n\n".join(blocks)


def render_predictions(predictions: Sequence[Prediction]) -> str:
    """How long a job takes, one line for each number of replicas.

    Args:
        predictions: of the same job.
    """
    lines = [
        f"  {found.replicas:8} | {duration(found.total_s):>12} | {duration(found.start_s):>12} | "
        f"{duration(found.work_s):>12} | {duration(found.drain_s + found.verify_s):>12}"
        for found in predictions
    ]
    head = f"  {'replicas':>8} | {'in all':>12} | {'start':>12} | {'work':>12} | {'its end':>12}"
    return "\n".join([head, *lines])


def histogram(counts: Mapping[str, int], width: int) -> str:
    """One line per label: label, count, share, bar.

    Args:
        counts: by label, in the order of the lines.
        width: columns of the terminal.
    """
    total, most = sum(counts.values()), max(counts.values(), default=0)
    labels = max((len(label) for label in counts), default=0)
    digits = len(number(most))
    room = max(4, min(60, width - labels - digits - 15))
    lines = [
        f"  {label:>{labels}}  {number(count):>{digits}}  {percent(count / max(total, 1)):>7}  "
        + bar(count / max(most, 1), room)
        for label, count in counts.items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def bar(share: float, width: int, rest: str = "") -> str:
    """A bar in eighths of a column.

    Args:
        share: 0..1 of the width.
        width: columns of the whole bar.
        rest: character that fills it up.
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)  # what is there is seen
    drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    return drawn + rest * (width - len(drawn))


def drift_text(event: Mapping[str, Any]) -> str:
    """What the audit warned of.

    Args:
        event: `audit_drift`, as in the event log.
    """
    rows, before = event["rows"], event.get("rows_before", 0)
    low, high = (percent(share) for share in event["interval"])
    which = f"the last {number(rows)} of {number(rows + before)}" if before else number(rows)
    then = "; exits were stopped" if event.get("stops_exits") else ""
    return (
        f"more tokens differ than the {percent(event['bound'])} allowed: when it was noticed "
        f"{percent(event['disagreement'])} ({low} to {high}) in {which} audited rows{then}"
    )


def number(value: float) -> str:
    """Thousands with commas; one decimal below ten where there is one."""
    if value != int(value) and abs(value) < 10:
        return f"{value:.1f}"
    return f"{round(value):,}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Two largest units of a time; tenths of less than ten seconds."""
    whole = round(seconds)
    if whole < 10:
        return f"{round(seconds, 1):g} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def flops(count: float) -> str:
    """Floating-point operations in decimal units."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} EFLOP"


def printable(text: str) -> str:
    """Text on one line, with no character that steers a terminal."""
    joined = " ".join(text.split())
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in joined)


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"  {label:<{_LABEL_WIDTH}}{value}" for label, value in facts.items() if value)


def _rows(rows_in: int, ok: int, error: int) -> str:
    text = f"{number(rows_in)} in, {number(ok)} ok, {number(error)} in error"
    return text + (f" ({percent(error / (ok + error))})" if error else "")


def recall(summary: JobSummary) -> str:
    """What is known of the pruned vocabulary, in a sentence without its end."""
    kept = summary.totals.kept
    return (
        f"{percent(kept.recall or 0.0)} of {number(kept.tokens)} tokens of layer "
        f"{summary.num_layers} were among the ids kept"
    )


def _slowest(rows: Sequence[SlowRow]) -> str:
    lines = []
    for row in rows[:_SLOW_LINES]:
        index = f", sample {row.sample_index}" if row.sample_index else ""
        took = f"{number(row.generated_tokens)} tokens in {duration(row.seconds)}"
        lines.append(f"  {printable(str(row.row_id))}{index}: {took}")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number(count)}" for name, count in ordered)


def _audit(found: AuditFigures) -> str:
    low, high = (percent(share) for share in found.disagreement_interval)
    return (
        f"{number(found.rows)} rows at full depth too: {percent(found.disagreement)} of the "
        f"tokens differ ({low} to {high}), "
        f"{percent(found.diverged / found.rows)} of the rows come out otherwise, "
        f"text distance {found.distance:.3f}"
    )


def _state(state: str, reason: str | None) -> str:
    return state + (f" ({printable(reason)})" if reason else "")


def _sample(sample: Sample, width: int) -> str:
    mean = sample.mean_exit_layer
    depth = "" if mean is None else f", mean exit layer {mean:.1f}"
    head = f"  {sample.row_id}: {sample.generated_tokens} tokens, {sample.finish_reason}{depth}"
    lines = [head]
    if sample.prompt is not None:
        lines += _wrapped("  > ", sample.prompt, width, 2)
    return "\n".join([*lines, *_wrapped("    ", sample.text, width, _SAMPLE_LINES)])


def _wrapped(indent: str, text: str, width: int, max_lines: int) -> Sequence[str]:
    return textwrap.wrap(
        printable(text) or "(empty)",
        width=max(width, 30),
        initial_indent=indent,
        subsequent_indent="    ",
        max_lines=max_lines,
        placeholder=" ...",
    )
