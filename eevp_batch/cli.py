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
from typing import Any, NoReturn, TypeVar

import click

from eevp_batch import __version__
from eevp_batch.cli_cluster import cancel, list_runs, logs, submit_there
from eevp_batch.cli_output import report, status, verify
from eevp_batch.cli_rayjob import rayjob
from eevp_batch.cli_run import Inside, prepared, run_and_sum_up, run_job_file
from eevp_batch.cli_tune import calibrate, fit, potential
from eevp_batch.console import echo_json, json_option, spec_overrides, width
from eevp_batch.errors import EevpError, UsageError

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


def _inside_options(command: _Command) -> _Command:
    """What `submit` gives along to the command that it starts on a cluster."""
    for option in (
        click.option("--run-id", metavar="ID", hidden=True, help="Of a run that is new."),
        click.option("--sent", metavar="FOLDER", hidden=True, help="Inputs that came along."),
        click.option("--stop-within", type=float, metavar="S", hidden=True, help="After SIGTERM."),
    ):
        command = option(command)
    return command


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
@click.option(
    "--wait/--no-wait",
    "waits",
    default=True,
    help="On a cluster: whether to show the run's log and end as it ends, or only its id.",
)
@click.option(
    "--check/--no-check",
    "checks",
    default=True,
    help="On a cluster: whether input and model are checked here before the cluster checks them.",
)
def submit(spec: str, overrides: tuple[str, ...], repair: bool, waits: bool, checks: bool) -> None:
    """Run a job, show its progress and sum it up; the same command again resumes it.

    With cluster.address auto, ray:// or http(s)://, it is submitted there.
    """
    if _is_submitted(spec, overrides):
        command = ["run", "--repair"] if repair else ["run"]
        submit_there(spec, overrides, command, waits, checks)
    elif not (waits and checks):
        name, allowed = "--no-check" if waits else "--no-wait", "auto, ray:// or http(s)://"
        raise UsageError(f"{name}: found a job that runs here; allowed: cluster.address {allowed}")
    else:
        run_job_file(spec, overrides, wants_bar=True, repairs=repair)


@main.command()
@_spec_command
@click.option("--repair", is_flag=True, help="As that of submit.")
@_inside_options
def run(
    spec: str,
    overrides: tuple[str, ...],
    repair: bool,
    run_id: str | None,
    sent: str | None,
    stop_within: float | None,
) -> None:
    """Run a job inside a cluster: as submit, with plain progress lines.

    It joins the Ray cluster that it is started on (RAY_ADDRESS, or cluster.address), and starts
    a Ray of its own where there is none.
    """
    inside = Inside(run_id, sent, stop_within)
    run_job_file(spec, overrides, wants_bar=False, repairs=repair, inside=inside)


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
@_inside_options
def retry_errors(
    job_or_out: str,
    overrides: tuple[str, ...],
    classes: tuple[str, ...],
    run_id: str | None,
    sent: str | None,
    stop_within: float | None,
) -> None:
    """Try a job's rows in error again, and patch them into its output."""
    from eevp_batch.prepare import earlier_plan, resolved_spec

    inside = Inside(run_id, sent, stop_within) if stop_within is not None else None
    with resolved_spec(job_or_out) as spec:
        if inside is None and _is_submitted(spec, overrides):
            options = [word for name in classes for word in ("--class", name)]
            submit_there(spec, overrides, ["retry-errors", *options], waits=True, checks=True)
            return
        job = prepared(spec, overrides, inside)
    opened = earlier_plan(job)
    if opened is None:
        raise UsageError(f"{job.store.text}: holds no job whose rows could be tried again")
    run_and_sum_up(job, opened, wants_bar=inside is None, retry=classes, inside=inside)


for command in (
    *(status, verify, report),
    *(logs, list_runs, cancel),
    *(potential, fit, calibrate),
    rayjob,
):
    main.add_command(command)


def _is_submitted(spec: str, overrides: Sequence[str]) -> bool:
    """Whether a job goes to a cluster's job server."""
    from eevp_batch.cluster.addresses import is_submitted
    from eevp_batch.spec_file import load_spec

    return is_submitted(load_spec(spec, overrides).cluster.address)


def start() -> None:
    """The program: `main`, and then the shortest way out.

    Native threads outlive their use: Ray's its shutdown, those of Arrow's pool a read of Parquet
    (apache/arrow#34314). Now and then one of them aborts the process while the interpreter is taken
    apart, and the exit code would be a signal's although the command did all it had to.
    """
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        with contextlib.suppress(OSError):  # whoever read our output has gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)
