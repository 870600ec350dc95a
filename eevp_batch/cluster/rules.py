"""Rules that the coordinator goes by; plain arithmetic."""

from __future__ import annotations

import math

from eevp_batch.errors import TooManyErrorsError
from eevp_batch.records import ChunkStats
from eevp_batch.storage.plan import Plan


def check_error_rate(totals: ChunkStats, max_error_rate: float, num_rows: int) -> None:
    """Stop as soon as it is certain; at the latest the last commit tells.

    Args:
        totals: of the committed chunks.
        max_error_rate: `run.max_error_rate`.
        num_rows: planned rows.

    Raises:
        TooManyErrorsError: more rows failed than the job allows.
    """
    allowed = math.floor(max_error_rate * num_rows + 1e-9)
    if totals.rows_error > allowed:
        classes = ", ".join(f"{n} {name}" for name, n in totals.error_classes.most_common())
        raise TooManyErrorsError(
            f"{totals.rows_error} of {totals.rows} rows are in error ({classes}); "
            f"run.max_error_rate {max_error_rate} allows {allowed} of {num_rows}"
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
