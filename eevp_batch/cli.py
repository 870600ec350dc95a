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
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from eevp_batch import __version__
from eevp_batch.cli_tune import calibrate, fit, potential
from eevp_batch.console import echo_json, json_option, spec_overrides, width
from eevp_batch.errors import EevpError, TooManyErrorsError, VerifyFailedError

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


_out_argument = click.argument("out", metavar="OUT")


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
def submit(spec: str, overrides: tuple[str, ...]) -> None:
    """Run a job, show its progress and sum it up; the same command again resumes it."""
    _run_job(spec, overrides, wants_bar=True)


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
@json_option
def plan(spec: str, overrides: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Show what a job would do and what it would cost; write nothing."""
    from eevp_batch.prepare import check_prompts, count_prompts, earlier_plan, prepare
    from eevp_batch.report.forecast import forecast
    from eevp_batch.report.text import render_forecast

    job = prepare(spec, overrides)
    earlier_plan(job)
    counts = count_prompts(job, check_prompts(job), rows)
    num_chunks, num_files = len(job.plan.chunks), len(job.plan.files)
    found = forecast(job.spec, job.model, counts, job.plan.num_rows, num_chunks, num_files)
    if as_json:
        echo_json(found.to_json())
    else:
        click.echo(f"{job.spec.name}, {job.model.id}\n{render_forecast(found, width())}")


@main.command()
@_out_argument
@click.option("--watch", "wants_watch", is_flag=True, help="Redraws it until the job has ended.")
@json_option
def status(out: str, wants_watch: bool, as_json: bool) -> None:
    """Show how far a job is, from its output folder alone."""
    from eevp_batch.report.summary import status_json
    from eevp_batch.report.text import render_status
    from eevp_batch.storage.status import read_status
    from eevp_batch.storage.store import Store

    if wants_watch and as_json:
        raise click.UsageError("--watch shows a job to people; --json does not go with it")
    store = Store.open(out)
    if wants_watch:
        from rich.console import Console

        from eevp_batch.report.watch import watch

        watch(lambda: read_status(store), Console())
        return
    found = read_status(store)
    if as_json:
        echo_json(status_json(found))
    else:
        click.echo(render_status(found, width(), time.time()))


@main.command()
@_out_argument
@json_option
def verify(out: str, as_json: bool) -> None:
    """Prove that every row is accounted for and that no file was altered."""
    from eevp_batch.storage.store import Store
    from eevp_batch.storage.verify import verify as verify_store

    report = verify_store(Store.open(out))
    if as_json:
        names = ("problems", "rows_in", "rows_ok", "rows_error", "data_parts", "errors_parts")
        echo_json({name: getattr(report, name) for name in names})
    if report.problems:
        raise VerifyFailedError(out, report.problems)
    if not as_json:
        click.echo(
            f"{out}: {report.rows_in:,} rows in = {report.rows_ok:,} ok + "
            f"{report.rows_error:,} in error; {report.parts:,} parts, every checksum matches"
        )


@main.command()
@_out_argument
@click.option(
    "--out",
    "to",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Writes the page there, and nothing into OUT.",
)
@json_option
def report(out: str, to: str | None, as_json: bool) -> None:
    """Sum up a job, and write report.html and a dataset card (README.md) into OUT.

    With --json, the figures are printed and nothing is written.
    """
    from eevp_batch.report.figures import gather
    from eevp_batch.storage.store import Store

    if as_json and to is not None:
        raise click.UsageError(
            "--json prints figures and writes no page; --out does not go with it"
        )
    if as_json:
        echo_json(gather(Store.open(out)).to_json())
    else:
        _sum_up(out, to, is_needed=True)


main.add_command(potential)
main.add_command(fit)
main.add_command(calibrate)


def _run_job(spec: str, overrides: tuple[str, ...], wants_bar: bool) -> None:
    """Check, plan, run, sum up; what was done is summed up also where too many rows failed."""
    from eevp_batch.prepare import check_prompts, needs_prompt_check, prepare

    job = prepare(spec, overrides)
    if needs_prompt_check(job.spec):
        check_prompts(job)
    opened = _open_plan(job)
    try:
        _run_cluster(job, opened, wants_bar)
    except TooManyErrorsError:
        _sum_up(job.store.text)
        raise
    _sum_up(job.store.text)


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


def _run_cluster(job: PreparedJob, opened: Plan, wants_bar: bool) -> None:
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
        )


def _sum_up(out: str, to: str | None = None, is_needed: bool = False) -> None:
    """Print a job's summary and write its report; at a job's end that may fail, the job has not."""
    from eevp_batch.report.figures import gather
    from eevp_batch.report.text import render_summary
    from eevp_batch.report.write import write_report
    from eevp_batch.storage.store import Store

    store = Store.open(out)
    figures = gather(store)
    click.echo(render_summary(figures.summary, width()))
    try:
        paths = write_report(store, figures, to)
    except OSError as error:
        error.add_note("the report could not be written; --out FILE writes it elsewhere")
        if is_needed:
            raise
        click.echo(f"eevp-batch: {error}: {error.__notes__[0]}", err=True)
        return
    for path in paths:
        click.echo(f"  {path}")


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
