"""From a job file to a job that can start: every check that needs neither Ray nor weights.

`submit`, `validate` and `plan` share it, so that what one accepts the others accept.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eevp_batch.errors import (
    CalibrationError,
    FittedExitsError,
    InputError,
    ModelError,
    ResumeRefusedError,
    RowError,
    SpecError,
    UsageError,
)
from eevp_batch.fitted_config import with_fitted
from eevp_batch.model_config import ModelConfig, prompt_room, read_model_config
from eevp_batch.report.forecast import PromptCounts
from eevp_batch.spec import JobSpec
from eevp_batch.spec_file import SpecSource, read_spec
from eevp_batch.storage import layout
from eevp_batch.storage.chunks import iter_rows, read_chunk
from eevp_batch.storage.inputs import InputParquet
from eevp_batch.storage.plan import Plan, changed_fields, make_plan, read_plan
from eevp_batch.storage.schema import listed
from eevp_batch.storage.store import Store

if TYPE_CHECKING:
    from eevp_batch.engine.prompts import PromptEncoder


@dataclass(frozen=True)
class PreparedJob:
    """A job whose file, model and input have been checked; nothing has been written.

    Attributes:
        source: the job file, with lines.
        plan: made now; an output folder may hold an earlier one.
        store: output folder.
        max_prompt_tokens: longest prompt that the job allows.
    """

    source: SpecSource
    model: ModelConfig
    plan: Plan
    store: Store
    max_prompt_tokens: int

    @property
    def spec(self) -> JobSpec:
        return self.source.spec


def prepare(path: str, overrides: Sequence[str] = ()) -> PreparedJob:
    """Read and check a job file, its model's configuration and its input.

    Args:
        path: job file.
        overrides: `a.b=c` each.

    Raises:
        UsageError: the first problem, with the line of the job file that it comes from.
    """
    source = read_spec(path, overrides)
    with located(source):
        store = Store.open(source.spec.output.path)
        model = read_model_config(source.spec.model)
        spec = with_fitted(source.spec, model)
        room = prompt_room(spec.sampling, model)
        plan = make_plan(spec, model)
        if not plan.num_rows:
            raise InputError(str(spec.input.path), "input.path", "no rows", "one row or more")
    limit = min(spec.prompt.max_prompt_tokens or room, room)
    return PreparedJob(replace(source, spec=spec), model, plan, store, limit)


@contextmanager
def located(source: SpecSource) -> Iterator[None]:
    """Add the line of the job file to an error that knows only a field.

    Args:
        source: the job file.
    """
    try:
        yield
    except SpecError as error:
        if error.line is not None or error.file != "job file":
            raise
        origin = source.origin(error.field)
        raise SpecError(
            origin.file, origin.line, error.field, error.found, error.allowed
        ) from error
    except InputError as error:
        _note(error, source, error.field)
        raise
    except ModelError as error:
        _note(error, source, "model.path")
        raise
    except FittedExitsError as error:
        _note(error, source, "exit.heads")
        raise
    except CalibrationError as error:
        _note(error, source, "exit.calibration")
        raise


def _note(error: UsageError, source: SpecSource, field: str) -> None:
    origin = source.origin(field)
    place = f"by {origin.file}" if origin.line is None else f"at {origin.file}:{origin.line}"
    error.add_note(f"{field} is set {place}")


@contextmanager
def resolved_spec(job_or_out: str) -> Iterator[str]:
    """The path of a job file, or of a copy of the one that an output folder was made by.

    Args:
        job_or_out: a job file, or an output folder or URI.

    Raises:
        UsageError: neither.
    """
    if os.path.isfile(job_or_out):
        yield job_or_out
        return
    try:
        content = Store.open(job_or_out).read(layout.RESOLVED_SPEC)
    except FileNotFoundError as error:
        allowed = "a job file, or the output of a job"
        raise UsageError(f"{job_or_out}: found neither; allowed: {allowed}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(layout.RESOLVED_SPEC))
        with open(path, "wb") as file:
            file.write(content)
        yield path


def earlier_plan(job: PreparedJob) -> Plan | None:
    """The plan that the output folder already holds; None in a new folder.

    Args:
        job: a job.

    Raises:
        ResumeRefusedError: it is the plan of a job that differs.
    """
    if not job.store.exists(layout.PLAN):
        return None
    stored = read_plan(job.store)
    if stored.fingerprint != job.plan.fingerprint:
        raise ResumeRefusedError(job.store.text, changed_fields(stored.fields, job.plan.fields))
    return stored


def check_prompts(job: PreparedJob) -> PromptEncoder:
    """Check that the job's prompt settings fit its tokenizer and its columns.

    Loads the tokenizer, which takes seconds.

    Args:
        job: a job.

    Returns:
        An encoder without a length limit.

    Raises:
        UsageError: no tokenizer, no chat template where one is needed, a template that does not
            parse or that names a column that a file does not have.
    """
    from eevp_batch.engine.prompts import PromptEncoder
    from eevp_batch.engine.tokenizer import load_tokenizer

    spec = job.spec
    unlimited = spec.prompt.model_copy(update={"max_prompt_tokens": None, "on_overlong": "error"})
    with located(job.source):
        tokenizer = load_tokenizer(job.model, spec.model)
        encoder = PromptEncoder(tokenizer, unlimited, spec.input, sys.maxsize)
        for file in job.plan.files:
            names = InputParquet.open(file.path).schema.names
            missing = [column for column in encoder.columns if column not in names]
            if missing:
                allowed = f"columns of the input: {listed(names)}"
                raise InputError(file.path, "prompt.template", f"no column {missing[0]!r}", allowed)
    return encoder


def needs_prompt_check(spec: JobSpec) -> bool:
    """Whether `check_prompts` could find anything: plain prompts fit every tokenizer.

    Args:
        spec: a job.
    """
    uses_chat = spec.prompt.chat is True or spec.prompt.system or spec.input.messages_column
    return bool(uses_chat or spec.prompt.template)


def count_prompts(job: PreparedJob, encoder: PromptEncoder, max_rows: int) -> PromptCounts:
    """Encode prompts and count their tokens.

    Args:
        job: a job.
        encoder: what `check_prompts` gave.
        max_rows: about how many rows to look at, in whole chunks spread over the job.
    """
    lengths: Counter[int] = Counter()
    failures: Counter[str] = Counter()
    chunks = job.plan.chunks
    mean_rows = job.plan.num_rows / len(chunks)
    wanted = min(len(chunks), max(1, round(max_rows / mean_rows)))
    for turn in range(wanted):
        chunk = chunks[turn * len(chunks) // wanted]
        for row in iter_rows(read_chunk(job.plan, chunk, encoder.columns)):
            _count_row(encoder, row, lengths, failures)
    rows = lengths.total() + failures.total()
    return PromptCounts(rows, lengths, failures, job.max_prompt_tokens)


def _count_row(
    encoder: PromptEncoder, row: dict[str, Any], lengths: Counter[int], failures: Counter[str]
) -> None:
    try:
        lengths[len(encoder.encode(row))] += 1
    except RowError as error:
        failures[type(error).__name__] += 1
