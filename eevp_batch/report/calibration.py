"""What a calibration found: the verdict, the grid, and quality against speed as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eevp_batch.report.svg import line_chart
from eevp_batch.report.text import number, percent


def render_calibration(found: Mapping[str, Any], with_grid: bool) -> str:
    """The verdict and the confirmation; the grid before them if asked for.

    Args:
        found: what `run_calibrate` gave.
        with_grid: whether every setting is shown.
    """
    lines = [
        f"{number(found['num_tuning_rows'])} tuning rows, {number(found['num_rows'])} calibration "
        f"rows; risk: {_risk_name(found)}"
    ]
    if with_grid:
        lines += ["", *_grid(found), ""]
    chosen = _chosen(found)
    if chosen is None:
        lines.append(f"nothing certified: {found['reason']}")
        return "\n".join(lines)
    lines.append(
        f"certified: risk at most {found['delta']:g} but for a probability of "
        f"{found['epsilon']:g} (observed {chosen['calibration_risk']:.4f}, "
        f"p {chosen['p_value']:.2g})"
    )
    exits = zip(found["exit_layers"], chosen["thresholds"], chosen["shares"], strict=False)
    for layer, threshold, share in exits:
        lines.append(f"  layer {layer}: threshold {threshold:.6g}, {percent(share)} leave")
    lines.append(
        f"  {chosen['mean_layer']:.1f} of {found['exit_layers'][-1]} layers a token; predicted "
        f"{chosen['speed']:.2f} times the speed of exits off, prompts left out"
    )
    return "\n".join([*lines, *_confirmed(found["confirmation"])])


def _risk_name(found: Mapping[str, Any]) -> str:
    if found["risk"] == "token":
        return "a row's share of tokens that differ from full depth, teacher-forced"
    return f"distance {found['metric']} of a row's whole output from full depth"


def _chosen(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if found["certified"] is None:
        return None
    chosen: Mapping[str, Any] = found["settings"][found["certified"]]
    return chosen


def _grid(found: Mapping[str, Any]) -> list[str]:
    """A line for each setting; what was not looked at is a dash."""
    width = max(12, 10 * (len(found["exit_layers"]) - 1))
    layers = ", ".join(map(str, found["exit_layers"][:-1]))
    lines = [
        f"  {'after ' + layers:>{width}}  leaving  layers  speed  tuning risk  risk      bound"
        "     p-value  place"
    ]
    for index, setting in enumerate(found["settings"]):
        place = "-" if setting["place"] is None else str(setting["place"] + 1)
        mark = "  certified" if index == found["certified"] else ""
        lines.append(
            f"  {_thresholds(setting['thresholds']):>{width}}  {percent(setting['exit_share']):>7}"
            f"  {setting['mean_layer']:>6.1f}  {setting['speed']:>5.2f}"
            f"  {setting['tuning_risk']:>11.4f}  {_figure(setting['calibration_risk'], '.4f'):>6}"
            f"  {_figure(setting['bound'], '.4f'):>9}  {_figure(setting['p_value'], '.2g'):>10}"
            f"  {place:>5}{mark}"
        )
    return lines


def _thresholds(values: Sequence[float]) -> str:
    return ", ".join("never" if value > 1 else f"{value:.5f}" for value in values)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _confirmed(found: Mapping[str, Any]) -> list[str]:
    def between(name: str) -> str:
        low, high = found[f"{name}_interval"]
        return f"{percent(found[name])} ({percent(low)} to {percent(high)})"

    return [
        f"generated freely, {number(found['rows'])} other rows, {number(found['tokens'])} tokens:",
        f"  rows as at full depth {between('identical')}",
        f"  tokens before a row's first difference {between('before_divergence')}",
        f"  edit distance of whole rows {between('edit_distance')}",
        f"  {percent(found['exit_share'])} leave early, {found['mean_layer']:.1f} layers a token; "
        f"{number(round(found['tokens_per_s_on']))} tokens/s with exits, "
        f"{number(round(found['tokens_per_s_off']))} without, in turns: {found['speed']:.2f} times",
    ]


def calibration_chart(found: Mapping[str, Any]) -> str:
    """Quality against predicted speed, as SVG.

    Args:
        found: what `run_calibrate` gave.
    """
    settings = found["settings"]
    tuned = sorted((s["speed"], 1 - s["tuning_risk"]) for s in settings if s["place"] is not None)
    tested = sorted(
        (s["speed"], 1 - s["calibration_risk"])
        for s in settings
        if s["calibration_risk"] is not None
    )
    lines = {"full depth": [(1.0, 1.0)], "tuning rows": tuned, "calibration rows": tested}
    speeds = [1.0, *(speed for speed, _ in tuned)]
    lines["1 - delta"] = [(min(speeds), 1 - found["delta"]), (max(speeds), 1 - found["delta"])]
    chosen = _chosen(found)
    if chosen is not None:
        lines["certified"] = [(chosen["speed"], 1 - chosen["calibration_risk"])]
        measured = found["confirmation"]
        lines["measured, freely"] = [(measured["speed"], 1 - measured["edit_distance"])]
    lines = {name: points for name, points in lines.items() if points}
    lowest = min(y for points in lines.values() for _, y in points)
    return line_chart(
        title="Quality against speed",
        x_label="speed, as a multiple of exits off",
        y_label="1 - risk",
        lines=lines,
        y_range=(lowest - 0.05 * (1 - lowest) - 0.001, 1.0),
    )
