"""Charts are well-formed, and points stand where their numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from eevp_batch.report.svg import BAR_COLOUR, HEIGHT, WIDTH, line_chart, round_ticks


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


def test_ticks_are_round_and_inside_the_axis() -> None:
    assert round_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert round_ticks(0.79, 1.0) == [0.8, 0.8500000000000001, 0.9, 0.9500000000000001, 1.0]
    assert round_ticks(-0.3, 30.3) == [0.0, 10.0, 20.0, 30.0]


def test_labels_stand_below_their_points() -> None:
    drawn = line_chart("t", "x", "y", {"up": [(0, 0), (1, 0.5)]}, labels={"up": ["99 %", "95 %"]})
    root = ElementTree.fromstring(drawn)
    dots = [float(dot.get("cx", 0)) for dot in root.findall("{*}circle")]
    texts = {text.text: float(text.get("x", 0)) for text in root.findall("{*}text")}
    assert [texts["99 %"], texts["95 %"]] == dots
