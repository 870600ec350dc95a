"""What a sequence leaves behind: its generation, or the failure of its row."""

from __future__ import annotations

import time

from eevp_batch.engine.sequence import Sequence
from eevp_batch.errors import RowError, RowTimeoutError
from eevp_batch.records import Generation, RowFailure


def finished(sequence: Sequence, text: str, num_layers: int) -> Generation:
    """The generation of a sequence that has ended, with its text cut at a stop string."""
    admitted_s = sequence.admitted_s
    return Generation(
        row_id=sequence.prompt.row_id,
        sample_index=sequence.prompt.sample_index,
        prompt_tokens=sequence.num_prompt,
        exits=sequence.exits,
        text=text,
        finish_reason=str(sequence.finish_reason),
        seed=sequence.seed,
        num_layers=num_layers,
        tag=sequence.prompt.tag,
        kept=sequence.kept,
        seconds=None if admitted_s is None else time.monotonic() - admitted_s,
    )


def failed(sequence: Sequence, error: RowError) -> RowFailure:
    """The failure of a sequence's row."""
    return RowFailure.of(sequence.prompt.row_id, error, sequence.prompt.tag)


def timed_out(sequence: Sequence) -> RowTimeoutError:
    """What is wrong with a sequence whose time is over."""
    return RowTimeoutError(
        f"not finished after {sequence.prompt.timeout_s:g} seconds in the engine "
        f"(run.row_timeout_s); {sequence.num_generated} tokens had been generated"
    )
