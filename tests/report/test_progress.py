from __future__ import annotations

import io
import os
import pty
from dataclasses import dataclass, replace

from eevp_batch.report.progress import BarDisplay, PlainDisplay, describe, make_display


@dataclass(frozen=True)
class Moment:
    """A job at one moment, as the coordinator tells it."""

    rows_total: int = 1000
    rows_done: int = 0
    rows_error: int = 0
    tokens_per_s: float | None = None
    mean_exit_layer: float | None = None
    eta_s: float | None = None
    elapsed_s: float = 0.0
    replicas: int = 2
    replicas_ready: int = 2
    is_draining: bool = False


BUSY = Moment(rows_done=250, tokens_per_s=1234.5, mean_exit_layer=21.34, eta_s=90)


def test_a_line_tells_what_is_known_and_no_more() -> None:
    assert describe(Moment()) == "0/1,000 rows (0%)"
    assert describe(replace(BUSY, replicas_ready=1, rows_error=3)) == (
        "250/1,000 rows (25%), 3 in error, 1/2 replicas ready, 1,234 tokens/s, "
        "mean exit layer 21.3, 1 min 30 s left"
    )
    assert describe(replace(BUSY, is_draining=True)).endswith("mean exit layer 21.3, draining")
    assert "left" not in describe(replace(BUSY, rows_done=1000, eta_s=0.0))


def plain_lines(moments: int, step_s: float) -> list[str]:
    """What a plain display writes of a job that reports every `step_s` seconds."""
    now = 0.0
    stream = io.StringIO()
    with PlainDisplay(stream, clock=lambda: now) as display:
        for turn in range(moments):
            now = turn * step_s
            display.update(replace(BUSY, rows_done=turn, elapsed_s=now))
    return stream.getvalue().splitlines()


def test_plain_lines_are_seconds_apart_and_the_last_state_is_written() -> None:
    lines = plain_lines(moments=61, step_s=1.0)
    assert len(lines) == 13, "a minute gives a line every five seconds"
    assert lines[-1].startswith("60/1,000 rows"), "the last state is not lost"
    assert len(set(lines)) == len(lines), "nothing is written twice"


def test_a_log_that_cannot_be_written_ends_no_job() -> None:
    with open("/dev/full", "w") as full, PlainDisplay(full) as display:
        display.message("replica-0 died")
        display.update(BUSY)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # closing it writes the rest
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, PlainDisplay(pipe) as display:
        display.message("replica-0 died")
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())


def test_plain_lines_grow_rarer_in_a_long_run() -> None:
    assert len(plain_lines(moments=3600 * 3, step_s=1.0)) < 300


def test_only_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert isinstance(make_display(terminal), BarDisplay)
        assert isinstance(make_display(terminal, wants_bar=False), PlainDisplay)
    os.close(leader)
    assert isinstance(make_display(io.StringIO()), PlainDisplay)


def test_a_bar_and_its_messages_survive_markup() -> None:
    stream = io.StringIO()
    with BarDisplay(stream) as display:
        display.update(BUSY)
        display.message("a message with [bold]brackets[/nothing]")
        display.update(replace(BUSY, rows_done=1000))
    text = stream.getvalue()
    assert "a message with [bold]brackets[/nothing]" in text
    assert "1,000/1,000 rows (100%)" in text and "\x1b" not in text
