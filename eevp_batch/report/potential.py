"""What exits could do, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eevp_batch.report.svg import line_chart
from eevp_batch.report.text import bar, number, percent


def render_potential(found: Mapping[str, Any], width: int) -> str:
    """The tables and the verdict.

    Args:
        found: what `Potential.to_json` gave.
        width: columns of the terminal.
    """
    blocks = [f"{number(found['tokens'])} tokens of {number(found['rows'])} rows"]
    blocks += [_lens(lens, found, width) for lens in found["lenses"]]
    return "\n\n".join([*blocks, found["verdict"]])


def _lens(lens: Mapping[str, Any], found: Mapping[str, Any], width: int) -> str:
    sizes = list(lens["layers"][0]["recall"])
    head = "  layer   agrees" + "".join(f"{'top ' + size:>9}" for size in sizes)
    lines = [f"{lens['name']} states" if lens["name"] == "raw" else f"{lens['name']} heads"]
    lines.append(f"{head}   leaving    first agrees")
    earliest = lens["earliest"]
    most = max(earliest.values())
    for layer in lens["layers"]:
        shares = [layer["agreement"], *layer["recall"].values(), layer["leaving"]]
        columns = "".join(f"{percent(share):>9}" for share in shares)
        lines.append(_row(layer["layer"], columns, earliest, found["tokens"], most, width))
    blank = " " * 9 * (len(sizes) + 2)
    lines.append(_row(found["num_layers"], blank, earliest, found["tokens"], most, width))
    lines.append(f"  an oracle would save {percent(lens['oracle_saving'])} of all layers")
    return "\n".join(lines)


def _row(
    layer: int, columns: str, earliest: Mapping[str, int], tokens: int, most: int, width: int
) -> str:
    count = earliest.get(str(layer), 0)
    line = f"  {layer:>5}{columns}{percent(count / tokens):>9} "
    return (line + bar(count / most, max(4, min(24, width - len(line))))).rstrip()


def potential_chart(found: Mapping[str, Any]) -> str:
    """Agreement and recall by layer, and where tokens first agree, as SVG.

    Args:
        found: what `Potential.to_json` gave.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for lens in found["lenses"]:
        points = {"agrees": [(x["layer"], x["agreement"]) for x in lens["layers"]]}
        points["leaving"] = [(x["layer"], x["leaving"]) for x in lens["layers"]]
        if lens["name"] == "raw":
            for size in lens["layers"][0]["recall"]:
                points[f"in top {size}"] = [(x["layer"], x["recall"][size]) for x in lens["layers"]]
        lines |= {f"{lens['name']}: {name}": some for name, some in points.items()}
    last = found["lenses"][-1]
    bars = [(int(layer), count / found["tokens"]) for layer, count in last["earliest"].items()]
    return line_chart(
        title=f"Exits by layer, {found['tokens']:,} tokens",
        x_label="layer",
        y_label="share of tokens",
        lines=lines,
        bars={f"{last['name']}: first agrees": bars},
        x_range=(0, found["num_layers"]),
    )
