"""What was fitted and how good it is, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eevp_batch.report.text import duration, number, percent


def render_fitted(manifest: Mapping[str, Any]) -> str:
    """The figures of a folder of fitted exits, all on held-out rows.

    Args:
        manifest: its `fitted.json`.
    """
    data, figures = manifest["data"], manifest["figures"]
    lines = [
        f"fitted to {number(data['rows'])} rows, judged by {number(data['held_out_rows'])} others; "
        f"states {data['states_s']} s, fitting {figures['fit_s']} s"
    ]
    adapter = figures.get("adapter")
    if adapter is not None:
        first, last = adapter["curve"][0], adapter["curve"][-1]
        lines.append(
            f"  adapter of rank {adapter['settings']['rank']}: {number(adapter['steps'])} steps in "
            f"{duration(adapter['seconds'])}, loss {first['loss']:.3f} to {last['loss']:.3f}; at "
            f"full depth {percent(adapter['full_depth_agreement'])} of the tokens are the "
            "original's"
        )
    for layer, head in figures["heads"].items():
        leaving = ", ".join(
            f"{percent(share)} at {100 * float(target):g} %"
            for target, share in head["share_leaving_of_all"].items()
        )
        mlp = f", MLP of {number(head['mlp_width'])}" if head.get("mlp_width") else ""
        lines.append(
            f"  head after layer {layer}{mlp}: agrees on {percent(head['agreement'])} of "
            f"{number(head['held_out_tokens'])} tokens; leaving, by the share of all tokens that "
            f"stays as it was: {leaving}"
        )
    for origin, bridge in figures["bridges"].items():
        kind, layer = origin.split(".")
        left = list(bridge["unexplained_variance"].values())
        lines.append(
            f"  bridge of {kind} tokens from layer {layer}: leaves "
            f"{percent(sum(left) / len(left))} of the variance of keys and values, at most "
            f"{percent(max(left))} in a layer"
        )
    if figures["proposal_recall"]:
        recall = ", ".join(f"{percent(r)} in {k}" for k, r in figures["proposal_recall"].items())
        lines.append(f"  proposal: holds the full model's choice {recall}")
    for size, share in figures.get("shortlist_recall", {}).items():
        lines.append(f"  shortlist of {number(int(size))} ids: holds it for {percent(share)}")
    return "\n".join(lines)
