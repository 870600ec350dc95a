from __future__ import annotations

import pytest

from eevp_batch.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such file\nTraceback\n  line 3", "no such file"),
        ("", "OSError"),
        ("failure from server:\nTraceback:\n  line 3\nRuntimeError: no room\n", None),
        ("failure from server:", "failure from server:"),
    ],
)
def test_an_error_is_told_in_the_line_that_says_what_happened(text: str, line: str | None) -> None:
    assert first_line(OSError(text)) == (line or "failure from server: RuntimeError: no room")
