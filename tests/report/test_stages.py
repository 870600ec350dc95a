from __future__ import annotations

import io
import os
import pty

from eevp_batch.report.stages import BarStages, PlainStages, make_stages


def test_plain_lines_tell_the_time_left_of_long_stages() -> None:
    now, stream = 0.0, io.StringIO()
    with PlainStages(stream, clock=lambda: now) as shown:
        shown.update("states", 1, 2)
        shown.update("states", 2, 2)
        for step in range(100, 201):  # from a checkpoint: the first hundred took no time here
            shown.update("adapter", step, 200)
            now += 1
        shown.message("that is all")
    assert stream.getvalue().splitlines() == [
        "states: done",
        "adapter: 105/200, 1 min 35 s left",
        "adapter: 135/200, 1 min 05 s left",
        "adapter: 165/200, 35 s left",
        "adapter: 195/200, 5 s left",
        "adapter: done",
        "that is all",
    ]


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        stages = make_stages(terminal)
        assert isinstance(stages, BarStages)
        with stages:
            stages.update("adapter", 3, 200)
            stages.update("adapter", 200, 200)
            stages.update("states", 1, 7)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "adapter: done" in text and "1/7" in text


def test_elsewhere_there_are_lines() -> None:
    assert isinstance(make_stages(io.StringIO()), PlainStages)
