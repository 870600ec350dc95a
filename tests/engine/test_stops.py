"""Stop strings, on a decoder where one token may be part of a character or show nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eevp_batch.engine.stops import StopStrings

SILENT = 300


def decode(token_ids: list[int]) -> str:
    return bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")


def first_stop(stops: list[str], token_ids: list[int]) -> int | None:
    watcher = StopStrings(stops, decode)
    for length in range(1, len(token_ids) + 1):
        if watcher.is_reached(token_ids[:length]):
            return length
    return None


def test_found_at_the_token_that_completes_it() -> None:
    assert first_stop(["END"], list(b"say END now")) == 7


def test_found_across_multibyte_characters() -> None:
    text = "abc → stop"
    assert first_stop(["→"], list(text.encode())) == len(b"abc ") + 3


def test_found_across_tokens_that_do_not_show() -> None:
    assert first_stop(["END"], [*b"E", SILENT, *b"N", SILENT, *b"D"]) == 5


def test_no_stop_string_never_stops() -> None:
    assert first_stop([], list(b"anything")) is None


def test_text_is_cut_before_the_first_stop_string() -> None:
    assert StopStrings(["B", "yy"], decode).cut("aayybB") == "aa"


def test_asking_after_each_token_reads_no_more_the_longer_the_text() -> None:
    read: list[int] = []

    def decode(token_ids: list[int]) -> str:
        read.append(len(token_ids))
        return "".join(map(chr, token_ids))

    stops = StopStrings(["END"], decode)
    token_ids = [*map(ord, "END of the prompt")]
    start = len(token_ids)
    for _ in range(1000):
        token_ids.append(ord("D"))
        assert not stops.is_reached(token_ids, start), "the prompt does not count"
    assert max(read) == len("END") + StopStrings.SPARE_TOKENS
    assert stops.is_reached([*token_ids, *map(ord, "END")], start)


def test_a_token_without_the_last_character_of_a_stop_is_looked_at_once() -> None:
    read: list[list[int]] = []

    def decode(token_ids: list[int]) -> str:
        read.append(token_ids)
        return "".join(map(chr, token_ids))

    stops = StopStrings(["END", "yy"], decode)
    for length in range(1, 100):
        assert not stops.is_reached([ord("E")] * length)
    assert read == [[ord("E")]]


@given(
    st.lists(st.text("aé→ \n", min_size=1, max_size=3), max_size=3),
    st.lists(st.sampled_from([*"aé→ \n".encode(), SILENT]), max_size=30),
)
def test_every_stop_is_found_where_the_whole_text_first_holds_it(
    stops: list[str], token_ids: list[int]
) -> None:
    lengths = range(1, len(token_ids) + 1)
    expected = (n for n in lengths if any(stop in decode(token_ids[:n]) for stop in stops))
    assert first_stop(stops, token_ids) == next(expected, None)
