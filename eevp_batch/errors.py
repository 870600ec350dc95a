"""Every exception this package raises on purpose, and the exit code each one ends a command with.

EevpError                     1
├── UsageError                2   what the user gave cannot be used; found before the start
│   ├── SpecError                 the job file: file, line, field, found, allowed
│   ├── InputError                the input data: file, column, found, allowed
│   ├── ModelError                the model folder: missing, unsupported, not to be trusted
│   ├── FittedExitsError          fitted exits: damaged, or of another model
│   └── CalibrationError          nothing to certify with, or certified for another job
├── TooManyErrorsError        3   more error rows than `run.max_error_rate` or `max_errors` allow
├── ResumeRefusedError        4   the output folder belongs to another job
├── ClusterError              5   no cluster to be reached, or it refused us
├── VerifyFailedError         6   the output does not account for every row
├── JobFailedError            1   replicas kept dying, or storage kept failing
│   ├── StorageError              storage kept failing, or is full (an OSError too)
│   └── StaleAttemptError         an attempt of an earlier lease arrived late; it is discarded
├── JobInterruptedError     130   the user ended the job; the same command resumes it
├── EngineError               1
│   └── EngineStalledError        a step ran nothing while work remained: a bug
└── RowError                      one row cannot be done; it becomes an error row
    ├── EmptyPromptError
    ├── PromptTooLongError
    ├── PromptRenderError         the template raised, or the messages are not messages
    ├── RowSkippedError           over-long, and `prompt.on_overlong` is skip; counts as no error
    ├── UnreadableTextError       the prompt's or a kept column's text is not UTF-8
    ├── NonFiniteScoresError      the model gave NaN or infinite scores for this row
    ├── RowTooLargeError          it does not fit into memory even alone
    ├── RowTimeoutError           it took longer than `run.row_timeout_s`
    └── ReplicaDiedError          it, alone on a replica, killed that replica again and again
"""

from __future__ import annotations

from typing import Any


def first_line(error: BaseException) -> str:
    """What happened, for a message of one line; the lines after it are for a debugger.

    Where the first line only announces a traceback, what happened is the last one.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return " ".join(dict.fromkeys((lines[0], lines[-1]) if lines[0].endswith(":") else lines[:1]))


class EevpError(Exception):
    """Base of everything raised on purpose."""

    exit_code = 1


class UsageError(EevpError):
    """What the user gave cannot be used."""

    exit_code = 2


class SpecError(UsageError):
    """The job file is wrong in one place.

    Attributes:
        file: path of the job file, or the option (`--set`) that the value came from.
        line: 1-based line in `file`, or None when the value came from an option.
        field: dotted name, such as `exit.threshold`.
        found: what stands there.
        allowed: what may stand there.
    """

    def __init__(self, file: str, line: int | None, field: str, found: Any, allowed: str) -> None:
        self.file, self.line, self.field, self.found, self.allowed = (
            file,
            line,
            field,
            found,
            allowed,
        )
        place = f"{file}:{line}" if line is not None else file
        super().__init__(f"{place}: {field}: found {found}; allowed: {allowed}")


class InputError(UsageError):
    """The input data is wrong in one place.

    Attributes:
        file: path of the Parquet file (or pattern) at fault.
        field: column or spec field.
        found: what stands there.
        allowed: what may stand there.
    """

    def __init__(self, file: str, field: str, found: Any, allowed: str) -> None:
        self.file, self.field, self.found, self.allowed = file, field, found, allowed
        super().__init__(f"{file}: {field}: found {found}; allowed: {allowed}")


class ModelError(UsageError):
    """The model cannot be used: missing, of an unsupported family, or not to be trusted."""


class TooManyErrorsError(EevpError):
    """More rows failed than `run.max_error_rate` or `run.max_errors` allow."""

    exit_code = 3


class FittedExitsError(UsageError):
    """Fitted exits cannot be used: damaged, of another format, or made for another model."""


class CalibrationError(UsageError):
    """A calibration cannot be made of these figures, is damaged, or holds for something else."""


class ResumeRefusedError(EevpError):
    """The output folder was planned by a job with another fingerprint.

    Attributes:
        changes: for each changed field its name, the planned value and the value now.
    """

    exit_code = 4

    def __init__(self, out: str, changes: list[tuple[str, Any, Any]]) -> None:
        self.out, self.changes = out, changes
        lines = [f"  {name}: planned {before!r}, now {now!r}" for name, before, now in changes]
        super().__init__(
            f"{out} was planned by another job; changed:\n"
            + "\n".join(lines)
            + "\nUse another output.path, or put the fields back."
        )


class ClusterError(EevpError):
    """The Ray cluster cannot be reached any more, or refused us."""

    exit_code = 5


class VerifyFailedError(EevpError):
    """The output folder does not account for every row.

    Attributes:
        problems: one sentence each, naming the file.

    Args:
        is_damage: whether chunks are damaged, which a repair does again.
    """

    exit_code = 6

    def __init__(self, out: str, problems: list[str], is_damage: bool = False) -> None:
        self.out, self.problems = out, problems
        super().__init__(f"{out}: {len(problems)} problem(s)\n" + "\n".join(problems))
        if is_damage:
            self.add_note(
                "`eevp-batch submit --repair` with the job file does damaged chunks again"
            )


class JobFailedError(EevpError):
    """The job cannot go on: replicas kept dying, or storage kept failing."""


class StorageError(JobFailedError, OSError):
    """Storage kept failing for as long as anyone waits for it, or is full; committed work stays."""


class StaleAttemptError(JobFailedError):
    """An attempt of an earlier lease arrived after the chunk was leased again."""


class JobInterruptedError(EevpError):
    """The user ended the job before it was done; the same command resumes it."""

    exit_code = 130


class EngineError(EevpError):
    """The engine broke one of its own rules."""


class EngineStalledError(EngineError):
    """A step ran nothing while work remained."""


class RowError(EevpError):
    """One row cannot be done; it becomes an error row."""


class EmptyPromptError(RowError):
    """The prompt is null, empty or encodes to no token."""


class PromptTooLongError(RowError):
    """The prompt has more tokens than `prompt.max_prompt_tokens` or the memory allows."""


class RowSkippedError(RowError):
    """The prompt is too long and `prompt.on_overlong` is skip; it counts against no limit."""


class PromptRenderError(RowError):
    """The template raised, or the messages are not a list of {role, content}."""


class UnreadableTextError(RowError):
    """The text of a column that the row needs is not UTF-8."""


class NonFiniteScoresError(RowError):
    """The model gave NaN or infinite scores for this row."""


class RowTooLargeError(RowError):
    """The row's activations do not fit into memory although nothing runs beside it."""


class RowTimeoutError(RowError):
    """A generation of the row was in the engine for longer than `run.row_timeout_s`."""


class ReplicaDiedError(RowError):
    """Replicas that had nothing but this row kept dying."""
