"""The command line. Heavy imports are inside the commands, so that `--help` needs only click.

Data goes to stdout, messages to stderr. Every error that we raise on purpose ends its command with
the error's exit code and one message. Exit codes: 0 all rows done; 1 failed; 2 usage or bad spec;
3 done, but more errors than allowed; 4 resume refused; 5 cluster unreachable or unauthorised;
6 verify failed; 130 interrupted, drained and resumable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from eevp_batch import __version__
from eevp_batch.cli_output import REPAIR_HINT, report, status, sum_up, verify
from eevp_batch.cli_rayjob import rayjob
from eevp_batch.cli_tune import calibrate, fit, potential
from eevp_batch.console import echo_json, json_option, spec_overrides, width
from eevp_batch.errors import EevpError, TooManyErrorsError, UsageError, VerifyFailedError

if TYPE_CHECKING:
    from eevp_batch.prepare import PreparedJob
    from eevp_batch.storage.plan import Plan

_Command = TypeVar("_Command", bound=Callable[..., Any])

PLAN_ROWS = 20_000
INTERRUPTED = 130


class _Commands(click.Group):
    """Ends a command that raised one of our errors; any other exception is a bug and is shown."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EevpError as error:
            _fail(ctx, error, error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted", INTERRUPTED)
        except BrokenPipeError:
            raise  # the reader of our output has gone; click ends quietly
        except OSError as error:
            _fail(ctx, error, EevpError.exit_code)


def _fail(ctx: click.Context, error: BaseException | str, exit_code: int) -> NoReturn:
    """Say what went wrong, with the notes that were added on the way, and end the command."""
    lines = [str(error), *getattr(error, "__notes__", [])]
    click.echo("eevp-batch: " + "\n".join(lines), err=True)
    ctx.exit(exit_code)


def _spec_command(command: _Command) -> _Command:
    """SPEC and --set, for a command that takes a job file."""
    return click.argument("spec", metavar="SPEC")(spec_overrides(command))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eevp-batch")
def main() -> None:
    """Generate text for a folder of prompts, from Parquet to Parquet, with early exits.

    SPEC is a job file (YAML); OUT is the folder or URI that a job writes to.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that cannot show a character shows a question mark instead of ending the job.
        sys.stdout.reconfigure(errors="replace")


@main.command()
@_spec_command
@click.option(
    "--repair",
    is_flag=True,
    help="First verifies what is there and does damaged chunks again; says which and why.",
)
def submit(spec: str, overrides: tuple[str, ...], repair: bool) -> None:
    """Run a job, show its progress and sum it up; the same command again resumes it."""
    _run_job(spec, overrides, wants_bar=True, repairs=repair)


@main.command()
@_spec_command
def run(spec: str, overrides: tuple[str, ...]) -> None:
    """Run a job inside a cluster: as submit, with plain progress lines."""
    _run_job(spec, overrides, wants_bar=False)


@main.command()
@_spec_command
@json_option
def validate(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a job file, its model and its input; write nothing."""
    from eevp_batch.prepare import check_prompts, earlier_plan, prepare

    job = prepare(spec, overrides)
    check_prompts(job)
    is_new = earlier_plan(job) is None
    if as_json:
        echo_json(
            {
                "name": job.spec.name,
                "rows": job.plan.num_rows,
                "chunks": len(job.plan.chunks),
                "files": len(job.plan.files),
                "fingerprint": job.plan.fingerprint,
                "output": job.store.text,
                "resumes": not is_new,
            }
        )
    else:
        state = "is new" if is_new else "holds this job; submit resumes it"
        click.echo(
            f"{spec}: valid: {job.plan.num_rows:,} rows in {len(job.plan.chunks):,} chunks\n"
            f"{job.store.text}: {state}"
        )


@main.command()
@_spec_command
@click.option(
    "--rows",
    default=PLAN_ROWS,
    show_default=True,
    type=click.IntRange(min=1),
    help="About how many rows to tokenise; more are estimated from these.",
)
@click.option(
    "--from",
    "out",
    metavar="OUT",
    help="A finished job of the same model and settings: how long this one takes at its pace.",
)
@json_option
def plan(spec: str, overrides: tuple[str, ...], rows: int, out: str | None, as_json: bool) -> None:
    """Show what a job would do and what it would cost; write nothing."""
    from eevp_batch.prepare import check_prompts, count_prompts, earlier_plan, prepare
    from eevp_batch.report.forecast import forecast
    from eevp_batch.report.scaling import predict_like
    from eevp_batch.report.text import render_forecast, render_predictions

    job = prepare(spec, overrides)
    earlier_plan(job)
    counts = count_prompts(job, check_prompts(job), rows)
    num_chunks, num_files = len(job.plan.chunks), len(job.plan.files)
    found = forecast(job.spec, job.model, counts, job.plan.num_rows, num_chunks, num_files)
    times = predict_like(out, job.spec, job.plan) if out else []
    if as_json:
        echo_json({**found.to_json(), "times": [time.to_json() for time in times]})
        return
    click.echo(f"{job.spec.name}, {job.model.id}\n{render_forecast(found, width())}")
    if times:
        click.echo(f"\nat the pace of {out}\n{render_predictions(times)}")


@main.command("retry-errors")
@click.argument("job_or_out", metavar="SPEC_OR_OUT")
@spec_overrides
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="NAME",
    help="Only rows with this error class; may be repeated. Else all but skipped rows.",
)
def retry_errors(job_or_out: str, overrides: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Try a job's rows in error again, and patch them into its output."""
    from eevp_batch.prepare import earlier_plan, prepare, resolved_spec

    with resolved_spec(job_or_out) as spec:
        job = prepare(spec, overrides)
    opened = earlier_plan(job)
    if opened is None:
        raise UsageError(f"{job.store.text}: holds no job whose rows could be tried again")
    _run_and_sum_up(job, opened, wants_bar=True, retry=classes)


for command in (status, verify, report, potential, fit, calibrate, rayjob):
    main.add_command(command)


def _run_job(spec: str, overrides: tuple[str, ...], wants_bar: bool, repairs: bool = False) -> None:
    """Check, plan, run, sum up; what was done is summed up also where too many rows failed."""
    from eevp_batch.prepare import check_prompts, needs_prompt_check, prepare

    job = prepare(spec, overrides)
    if needs_prompt_check(job.spec):
        check_prompts(job)
    _run_and_sum_up(job, _open_plan(job), wants_bar, repairs=repairs)


def _run_and_sum_up(
    job: PreparedJob,
    opened: Plan,
    wants_bar: bool,
    retry: Sequence[str] | None = None,
    repairs: bool = False,
) -> None:
    try:
        _run_cluster(job, opened, wants_bar, retry, repairs)
    except TooManyErrorsError:
        sum_up(job.store.text)
        raise
    except VerifyFailedError as error:
        error.add_note(REPAIR_HINT)
        raise
    sum_up(job.store.text)


def _open_plan(job: PreparedJob) -> Plan:
    """Write the plan, or take up the one that is there, and say what will run."""
    from eevp_batch.spec_file import dump_spec
    from eevp_batch.storage.plan import open_plan

    opened = open_plan(job.store, job.plan, dump_spec(job.spec))
    verb = "starts" if opened.run_id == job.plan.run_id else "resumes"
    click.echo(
        f"{opened.run_id} {verb}: {opened.num_rows:,} rows in {len(opened.chunks):,} chunks, "
        f"{job.spec.cluster.replicas} replica(s), output in {job.store.text}",
        err=True,
    )
    return opened


def _run_cluster(
    job: PreparedJob, opened: Plan, wants_bar: bool, retry: Sequence[str] | None, repairs: bool
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
        )


def start() -> None:
    """The program: `main`, and after a job on Ray the shortest way out.

    Ray's native threads outlive its shutdown. Now and then one of them crashes while the
    interpreter is taken apart, and the exit code would be a signal's although all rows are done.
    """
    try:
        main()
    except SystemExit as end:
        if "ray" not in sys.modules or not isinstance(end.code, int):
            raise
        with contextlib.suppress(OSError):  # whoever read our output has gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)


if __name__ == "__main__":
    start()
