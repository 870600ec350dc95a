"""When a job has too many rows in error, and how it is told."""

from __future__ import annotations

from collections import Counter

import pytest

from eevp_batch.cluster.rules import check_errors
from eevp_batch.errors import TooManyErrorsError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import RunSpec


def totals(**classes: int) -> ChunkStats:
    counts = Counter(classes)
    return ChunkStats(rows_ok=50, rows_error=counts.total(), error_classes=counts)


@pytest.mark.parametrize(
    ("rate", "number", "errors", "words"),
    [
        (0.1, None, 11, "run.max_error_rate 0.1 allows 10 of 100"),
        (0.1, 20, 11, "run.max_error_rate 0.1 allows 10 of 100"),
        (0.1, 3, 4, "run.max_errors allows 3"),
        (1.0, 0, 1, "run.max_errors allows 0"),
        (0.0, None, 1, "allows 0 of 100"),
    ],
)
def test_past_either_limit_there_are_too_many(
    rate: float, number: int | None, errors: int, words: str
) -> None:
    run = RunSpec(max_error_rate=rate, max_errors=number)
    check_errors(totals(NonFiniteScoresError=errors - 1), run, 100)
    with pytest.raises(TooManyErrorsError) as caught:
        check_errors(totals(NonFiniteScoresError=errors), run, 100)
    assert words in str(caught.value) and f"{errors} NonFiniteScoresError" in str(caught.value)


def test_rows_that_were_skipped_on_purpose_do_not_count() -> None:
    run = RunSpec(max_error_rate=0.5, max_errors=1)
    check_errors(totals(RowSkippedError=40, EmptyPromptError=1), run, 100)
    with pytest.raises(TooManyErrorsError, match=r"2 of 92 rows are in error \(2 Empty"):
        check_errors(totals(RowSkippedError=40, EmptyPromptError=2), run, 100)
