from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.report.text import (
    bar,
    duration,
    flops,
    histogram,
    number,
    percent,
    printable,
    size,
)


@given(st.floats(0, 1), st.integers(1, 100))
def test_a_bar_is_as_long_as_its_share(share: float, width: int) -> None:
    drawn = bar(share, width)
    assert len(drawn) <= width, "a bar never leaves its width"
    assert abs(drawn.count("█") - share * width) <= 1, "a bar is right to a column"
    assert (share > 0) == bool(drawn), "what is there is seen, and nothing else"
    assert len(bar(share, width, "░")) == width, "a filled bar has its whole width"


@given(
    st.dictionaries(st.text("abc12", min_size=1, max_size=6), st.integers(0, 10**9), max_size=8),
    st.integers(40, 200),
)
def test_a_histogram_has_a_line_per_label_and_fits(counts: dict[str, int], width: int) -> None:
    lines = histogram(counts, width).splitlines()
    assert len(lines) == len(counts)
    for line, (label, count) in zip(lines, counts.items(), strict=True):
        assert len(line) <= width, f"{line!r} is wider than {width}"
        words = line.split()
        assert words[0] == label and words[1] == f"{count:,}"
        assert ("█" in line or words[-1] != "%") == bool(count), (
            "a bar says that there is something"
        )


def test_shares_add_up() -> None:
    shares = [
        float(line.split()[2]) for line in histogram({"a": 1, "b": 1, "c": 2}, 80).split("\n")
    ]
    assert shares == [25.0, 25.0, 50.0]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1234567), "1,234,567"),
        (number(3.14159), "3.1"),
        (number(12.6), "13"),
        (number(0), "0"),
        (percent(0.0399), "4.0 %"),
        (duration(0.36), "0.4 s"),
        (duration(0.04), "0 s"),
        (duration(9.96), "10 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(3599), "59 min 59 s"),
        (duration(3600), "1 h 00 min"),
        (duration(360000), "100 h 00 min"),
        (size(512), "512 B"),
        (size(22.5 * 1024), "22.5 KiB"),
        (size(3 << 40), "3 TiB"),
        (flops(999), "999 FLOP"),
        (flops(1.5e12), "1.5 TFLOP"),
        (flops(2e18), "2 EFLOP"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.text())
def test_generated_text_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or ord(c) == 127 for c in shown), "no control character is left"


def test_escape_sequences_lose_their_escape() -> None:
    assert printable("a\x1b[31mred\nb\u202e") == "a [31mred b "
