"""Charts are well-formed, and points stand where their numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from eevp_batch.report.svg import BAR_COLOUR, HEIGHT, WIDTH, line_chart


def test_points_stand_in_order_and_inside() -> None:
    drawn = line_chart(
        "a < b", "x", "y & z", {"up": [(0, 0), (1, 0.5), (2, 1)], "dot": [(1, 1)]},
        bars={"some": [(0, 0.25), (2, 1)]},
    )  # fmt: skip
    root = ElementTree.fromstring(drawn)
    up, dot = (line.get("points", "") for line in root.findall("{*}polyline"))
    places = [tuple(map(float, place.split(","))) for place in up.split()]
    assert places == sorted(places), "from left to right"
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert dot == f"{places[1][0]},{places[2][1]}"
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    texts = [text.text for text in root.findall("{*}text")]
    assert {"a < b", "y & z", "up", "dot", "some"} <= set(texts)
    low, high, *_ = [bar for bar in root.findall("{*}rect") if bar.get("fill") == BAR_COLOUR]
    assert float(high.get("height", 0)) > 3.9 * float(low.get("height", 0))


def test_one_point_and_no_point_can_be_drawn() -> None:
    assert "NaN" not in line_chart("t", "x", "y", {"one": [(3, 0.5)]})
    ElementTree.fromstring(line_chart("t", "x", "y", {}))
