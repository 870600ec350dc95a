"""The commands that read an output folder: status, verify, report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from eevp_batch.console import address_option, echo_json, json_option, width
from eevp_batch.errors import VerifyFailedError

if TYPE_CHECKING:
    from eevp_batch.cluster.cluster_job import ClusterJob

_out_argument = click.argument("out", metavar="OUT")


@click.command()
@click.argument("run", metavar="RUN_OR_OUT")
@click.option("--watch", "wants_watch", is_flag=True, help="Redraws it until the job has ended.")
@address_option
@json_option
def status(run: str, wants_watch: bool, address: str | None, as_json: bool) -> None:
    """Show how far a job is, from its output folder alone where that can be read from here."""
    from eevp_batch.cluster.runs import find_output
    from eevp_batch.report.summary import status_json
    from eevp_batch.report.text import render_status
    from eevp_batch.storage.status import read_status

    if wants_watch and as_json:
        raise click.UsageError("--watch shows a job to people; --json does not go with it")
    store, job = find_output(run, address)
    if job is not None:
        _status_there(job, as_json)
        return
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


def _status_there(job: ClusterJob, as_json: bool) -> None:
    """What its cluster knows of a job whose output cannot be read from here."""
    if as_json:
        echo_json(job.to_json())
    else:
        click.echo(f"{job.run_id}: {job.state}\n  {job.progress}\n  output in {job.output}")


@click.command()
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
        raise VerifyFailedError(out, report.problems, bool(report.damaged))
    if not as_json:
        click.echo(
            f"{out}: {report.rows_in:,} rows in = {report.rows_ok:,} ok + "
            f"{report.rows_error:,} in error; {report.parts:,} parts, every checksum matches"
        )


@click.command()
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
        sum_up(out, to, is_needed=True)


def sum_up(out: str, to: str | None = None, is_needed: bool = False) -> None:
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
        elsewhere = "; --out FILE writes it elsewhere" if to is None else ""
        error.add_note(f"the report could not be written{elsewhere}")
        if is_needed:
            raise
        click.echo(f"eevp-batch: {error}: {error.__notes__[0]}", err=True)
        return
    for path in paths:
        click.echo(f"  {path}")
