"""Running a job in this process: what `submit` does without a cluster, and `run` on one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eevp_batch.cli_output import sum_up
from eevp_batch.errors import SpecError, StorageError, TooManyErrorsError, first_line

if TYPE_CHECKING:
    from eevp_batch.prepare import PreparedJob
    from eevp_batch.storage.plan import Plan


@dataclass(frozen=True, slots=True)
class Inside:
    """What a command that was started on a cluster was given along.

    Attributes:
        run_id: of the run, if it is new.
        sent: folder of input files that came along.
        stop_within_s: after SIGTERM.
    """

    run_id: str | None
    sent: str | None
    stop_within_s: float | None


def run_job_file(
    spec: str,
    overrides: tuple[str, ...],
    wants_bar: bool,
    repairs: bool = False,
    inside: Inside | None = None,
) -> None:
    """Check, plan, run, sum up.

    Args:
        spec: path of the job file.
        overrides: `a.b=c` each.
        wants_bar: whether a terminal gets a bar.
        repairs: see `run_job`.
        inside: what it was given along on a cluster; None: it runs where it was called.
    """
    from eevp_batch.history import remember
    from eevp_batch.prepare import check_prompts, needs_prompt_check

    job = prepared(spec, overrides, inside)
    if needs_prompt_check(job.spec):
        check_prompts(job)
    opened = _open_plan(job)
    if inside is None:
        remember(opened.run_id, job.spec.name, job.store.text)
    run_and_sum_up(job, opened, wants_bar, repairs=repairs, inside=inside)


def prepared(spec: str, overrides: Sequence[str], inside: Inside | None) -> PreparedJob:
    """A job whose file, model and input have been checked; inputs that came along are taken in.

    Args:
        spec: path of the job file.
        overrides: `a.b=c` each.
        inside: see `run_and_sum_up`.
    """
    from eevp_batch.prepare import prepare
    from eevp_batch.spec_file import load_spec
    from eevp_batch.storage.sent_inputs import take_in
    from eevp_batch.storage.store import Store

    if inside is not None and inside.sent is not None:
        take_in(Store.open(load_spec(spec, overrides).output.path), Path(inside.sent))
    job = prepare(spec, overrides)
    if inside is None or inside.run_id is None:
        return job
    return replace(job, plan=replace(job.plan, run_id=inside.run_id))


def run_and_sum_up(
    job: PreparedJob,
    opened: Plan,
    wants_bar: bool,
    retry: Sequence[str] | None = None,
    repairs: bool = False,
    inside: Inside | None = None,
) -> None:
    """Run a planned job; what was done is summed up also where too many rows failed.

    Args:
        job: the job.
        opened: its plan, which is written.
        wants_bar: whether a terminal gets a bar.
        retry: see `run_job`.
        repairs: see `run_job`.
        inside: what it was given along on a cluster; None: it runs where it was called.
    """
    from eevp_batch.prepare import located

    try:
        with located(job.source):
            _run_cluster(job, opened, wants_bar, retry, repairs, inside)
    except TooManyErrorsError:
        sum_up(job.store.text)
        raise
    sum_up(job.store.text)


def _open_plan(job: PreparedJob) -> Plan:
    """Write the plan, or take up the one that is there, and say what will run.

    Raises:
        SpecError: nothing can be written where the output is to go.
    """
    from eevp_batch.prepare import located
    from eevp_batch.spec_file import dump_spec
    from eevp_batch.storage import layout
    from eevp_batch.storage.plan import open_plan

    verb = "resumes" if job.store.exists(layout.PLAN) else "starts"
    try:
        opened = open_plan(job.store, job.plan, dump_spec(job.spec))
    except StorageError:
        raise
    except OSError as error:
        found = f"{job.spec.output.path!r}, where nothing can be written ({first_line(error)})"
        with located(job.source):
            allowed = "a folder that can be made and written to"
            raise SpecError("job file", None, "output.path", found, allowed) from error
    click.echo(
        f"{opened.run_id} {verb}: {opened.num_rows:,} rows in {len(opened.chunks):,} chunks, "
        f"{job.spec.cluster.max_replicas} replica(s), output in {job.store.text}",
        err=True,
    )
    return opened


def _run_cluster(
    job: PreparedJob,
    opened: Plan,
    wants_bar: bool,
    retry: Sequence[str] | None,
    repairs: bool,
    inside: Inside | None,
) -> None:
    from eevp_batch.cluster.jobs import run_job
    from eevp_batch.report.progress import make_display

    with make_display(sys.stderr, wants_bar) as display:
        run_job(
            job.spec,
            job.model,
            opened,
            job.store,
            on_progress=display.update,
            on_message=display.message,
            retry=retry,
            repairs=repairs,
            is_inside=inside is not None,
            stop_within_s=inside.stop_within_s if inside else None,
        )
