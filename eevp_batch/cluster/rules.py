"""Rules that the coordinator goes by; plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter

from eevp_batch.errors import RowSkippedError, TooManyErrorsError
from eevp_batch.records import ChunkStats
from eevp_batch.spec import RunSpec
from eevp_batch.storage.plan import Plan


def check_errors(totals: ChunkStats, run: RunSpec, num_rows: int) -> None:
    """Stop as soon as it is certain; at the latest the last commit tells.

    Rows that were skipped on purpose count as no errors.

    Args:
        totals: of the committed chunks.
        run: its `max_error_rate` and `max_errors`.
        num_rows: planned rows.

    Raises:
        TooManyErrorsError: more rows failed than the job allows.
    """
    counted = Counter(totals.error_classes)
    del counted[RowSkippedError.__name__]
    by_rate = math.floor(run.max_error_rate * num_rows + 1e-9)
    limits = [(by_rate, f"run.max_error_rate {run.max_error_rate} allows {by_rate} of {num_rows}")]
    if run.max_errors is not None:
        limits.append((run.max_errors, f"run.max_errors allows {run.max_errors}"))
    allowed, text = min(limits)
    if counted.total() > allowed:
        classes = ", ".join(f"{n} {name}" for name, n in counted.most_common())
        raise TooManyErrorsError(
            f"{counted.total()} of {totals.rows} rows are in error ({classes}); {text}; with a "
            "higher limit the same command goes on, and `retry-errors` tries these rows again"
        )


def max_leases(max_resident: int, plan: Plan) -> int:
    """Leases that keep a replica's engine full.

    While the oldest chunk drains, the others must fill the engine alone: beside it that takes
    ceil(sequences the engine can hold / sequences of an average chunk), and one at least.

    Args:
        max_resident: sequences that the engine can hold.
        plan: the job's chunks.
    """
    sequences = plan.num_rows * plan.num_samples / len(plan.chunks)
    return 1 + max(1, math.ceil(max_resident / sequences))


def start_delay_s(deaths_in_a_row: int) -> float:
    """How long a slot stays empty after so many deaths in a row: 0, 0.5, 1, 2, ... at most 30 s."""
    return 0.0 if deaths_in_a_row <= 1 else min(30.0, 0.5 * 2.0 ** (deaths_in_a_row - 2))
