"""The commands about runs on a cluster: what `submit` does there, logs, list, cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from eevp_batch.console import address_option, echo_json, json_option, width
from eevp_batch.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from eevp_batch.cluster.job_server import JobServer
    from eevp_batch.cluster.runs import Run
    from eevp_batch.cluster.sending import Parcel
    from eevp_batch.spec_file import SpecSource

_FOLLOW_S = 2.0

_run_argument = click.argument("run", metavar="RUN_OR_OUT")


@click.command()
@_run_argument
@click.option("-f", "--follow", "follows", is_flag=True, help="Goes on until the job has ended.")
@click.option(
    "--replica",
    type=click.IntRange(min=0),
    metavar="N",
    help="What replica N writes, instead of the process that coordinates.",
)
@address_option
def logs(run: str, follows: bool, replica: int | None, address: str | None) -> None:
    """Show what a run writes, or its event log where no cluster knows it (any more)."""
    from eevp_batch.cluster.runs import find_run

    found = find_run(run, address)
    if found.lost is not None:
        click.echo(f"eevp-batch: {found.lost}; from the event log:", err=True)
    if found.server is None or found.job is None:
        texts = _events(found, replica, follows)
    elif replica is None:
        job, server = found.job, found.server
        texts = (
            server.follow(job.submission_id) if follows else iter([server.logs(job.submission_id)])
        )
    else:
        texts = _replica_logs(found, replica, follows)
    for text in texts:
        click.echo(text, nl=not text.endswith("\n"))


@click.command("list")
@address_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1))
@json_option
def list_runs(address: str | None, limit: int, as_json: bool) -> None:
    """List runs: those of the cluster, and those submitted from here, newest first.

    Without --address, every cluster is asked that a run of the list was submitted to.
    """
    from eevp_batch.cluster.addresses import default_address, is_submitted
    from eevp_batch.cluster.runs import known_jobs
    from eevp_batch.history import recall

    if address and not is_submitted(address):
        allowed = "auto, ray://HOST:PORT or http(s)://HOST:PORT, where jobs are submitted"
        raise UsageError(f"--address: found {address}; allowed: {allowed}")
    remembered = [] if address else list(reversed(recall()))[:limit]
    named = [address or default_address(), *(entry.address for entry in remembered)]
    jobs, lost = known_jobs([found for found in named if found and is_submitted(found)])
    if address and lost:
        raise ClusterError(lost[0])
    for reason in lost:
        click.echo(f"eevp-batch: {reason}", err=True)
    rows: dict[str, dict[str, Any]] = {}
    for server, job in jobs:  # the last job of a run is the one that counts
        rows[job.run_id] = {**job.to_json(), "cluster": server.url}
    for entry in remembered:
        rows.setdefault(
            entry.run_id, _stored_row(entry.run_id, entry.name, entry.out, entry.unix_s)
        )
    newest = sorted(rows.values(), key=lambda row: row["started_unix_s"] or 0.0, reverse=True)
    if as_json:
        echo_json({"runs": newest[:limit]})
    else:
        _echo_table(newest[:limit])


@click.command()
@_run_argument
@click.option("--drain", "drains", is_flag=True, help="What is under way is finished first.")
@address_option
def cancel(run: str, drains: bool, address: str | None) -> None:
    """End a run, on a cluster or anywhere else; what is committed stays, and `submit` goes on.

    Without --drain, chunks that are not finished within 25 seconds are done again by the next run.
    """
    from eevp_batch.cluster.runs import find_run
    from eevp_batch.storage.cancelling import ask_to_end

    found = find_run(run, address)
    job, server = found.job, found.server
    is_there = server is not None and job is not None and not job.has_ended
    if server is not None and job is not None and is_there and not (drains and job.has_started):
        server.stop(job.submission_id)
        pending = "has not begun; ends when a node takes it, pending until then (15 min at most)"
        when = "stops" if job.has_started else pending
        click.echo(f"{found.run_id}: {when}, on {server.url}", err=True)
        return
    if found.store is None:
        raise UsageError(
            f"{found.out or run}: found an output folder that cannot be read from here; allowed: "
            "cancel without --drain of a run that its cluster knows, or --drain from a machine "
            "that sees the output"
        )
    ask_to_end(found.store, drains)
    verb = "finishes what is under way and ends" if drains else "ends"
    click.echo(f"{found.run_id}: {verb}, within some seconds of hearing of it", err=True)


def submit_there(
    spec: str,
    overrides: Sequence[str],
    command: Sequence[str],
    waits: bool,
    checks: bool,
) -> None:
    """Submit a job to the cluster that it names.

    Args:
        spec: path of the job file.
        overrides: that the user gave.
        command: what runs there, with its options.
        waits: whether to show its log and end as it ends.
        checks: whether input, model and prompts are checked here first.
    """
    from eevp_batch.cluster.job_server import JobServer
    from eevp_batch.cluster.sending import pack, unseen_here
    from eevp_batch.cluster.submitting import entry_point
    from eevp_batch.history import remember
    from eevp_batch.prepare import located
    from eevp_batch.spec_file import read_spec

    source = read_spec(spec, overrides)
    cluster, out = source.spec.cluster, source.spec.output.path
    server = JobServer(str(cluster.address))
    with located(source):
        seen = ["/"] if server.is_here else cluster.shared_paths
        parcel = pack(source, spec, seen, server.url)
        # A node of the cluster sees what is shared; another machine need not.
        unseen = [] if server.is_here else unseen_here(source, seen)
        run_id = _checked_run(source, spec, overrides, parcel, unseen, out, checks)
    _refuse_running(server, run_id, out)
    with entry_point(source, parcel, run_id, out, command, overrides) as entry:
        submission_id = server.submit(run_id, entry)
    remember(run_id, source.spec.name, out, cluster.address, submission_id)
    click.echo(f"{run_id}: submitted to {server.url}, output in {out}", err=True)
    click.echo(f"Ray dashboard: {server.page(submission_id)}", err=True)
    if waits:
        _wait(server, run_id, submission_id, out)
    else:
        click.echo(run_id)


def _checked_run(
    source: SpecSource,
    spec: str,
    overrides: Sequence[str],
    parcel: Parcel,
    unseen: Sequence[str],
    out: str,
    checks: bool,
) -> str:
    """The run's id, after every check that can be made here; the cluster makes all of them."""
    from eevp_batch.cluster.runs import open_output
    from eevp_batch.prepare import check_prompts, earlier_plan, needs_prompt_check, prepare
    from eevp_batch.storage.plan import new_run_id, read_plan

    if unseen:
        click.echo(f"{unseen[0]} is not on this machine: the cluster checks the job", err=True)
    elif checks:
        job = prepare(spec, overrides)
        if needs_prompt_check(job.spec):
            check_prompts(job)
        if not parcel.has_inputs:  # else the plan names them as the cluster will
            earlier_plan(job)
    store = open_output(out)
    return new_run_id(source.spec.name) if store is None else read_plan(store).run_id


def _refuse_running(server: JobServer, run_id: str, out: str) -> None:
    jobs = [*server.of_run(run_id), *server.of_output(out)]
    running = [job.submission_id for job in jobs if not job.has_ended]
    if running:
        raise UsageError(
            f"{out}: {running[0]} on {server.url} is working on it; `eevp-batch logs -f "
            f"{running[0]}` follows it, `eevp-batch cancel {running[0]}` ends it"
        )


def _wait(server: JobServer, run_id: str, submission_id: str, out: str) -> None:
    """Show the log of a job until its end, and end as it did."""
    from eevp_batch.cluster.submitting import result_of

    try:
        for text in server.follow(submission_id):
            click.echo(text, err=True, nl=False)
    except KeyboardInterrupt:
        click.echo(
            f"\n{run_id} goes on; `eevp-batch logs -f {run_id}` follows it, "
            f"`eevp-batch cancel {run_id}` ends it",
            err=True,
        )
        raise
    code = result_of(server, submission_id)
    if code:
        click.get_current_context().exit(code)
    click.echo(f"{run_id}: done, output in {out}")


def _events(found: Run, replica: int | None, follows: bool) -> Iterator[str]:
    """Lines of the event log; of one replica those that name it."""
    from itertools import islice

    from eevp_batch.report.event_lines import event_line, is_about
    from eevp_batch.storage.status import read_events, read_status

    if found.store is None:
        raise UsageError(f"{found.out}: found no output that can be read from here")
    told, is_known = 0, replica is None
    while True:
        has_ended = not follows or read_status(found.store).state != "running"
        for event in islice(read_events(found.store), told, None):
            told += 1
            if replica is None or is_about(event, replica):
                is_known = True
                yield event_line(event)
        if has_ended:
            if not is_known:
                raise UsageError(f"--replica: found {replica}, which no event of the job names")
            return
        time.sleep(_FOLLOW_S)


def _replica_logs(found: Run, number: int, follows: bool) -> Iterator[str]:
    """What the replicas of one place wrote; a replica that replaces another one follows it."""
    from eevp_batch.cluster.replica_logs import replicas_of, written_by

    if found.server is None or found.job is None:
        return
    told: dict[tuple[str, int], int] = {}
    while True:
        has_ended = not follows or found.server.job(found.job.submission_id).has_ended
        for actor in replicas_of(found.server, found.job, number):
            for stream, text in enumerate(written_by(found.server, actor)):
                key = (actor.actor_id, stream)
                if key not in told and text:
                    yield f"==> {actor.name} ({actor.state.lower()})"
                new = text[told.get(key, 0) :]
                told[key] = max(len(text), told.get(key, 0))
                if new:
                    yield new
        if has_ended:
            return
        time.sleep(_FOLLOW_S)


def _stored_row(run_id: str, name: str, out: str, unix_s: float) -> dict[str, Any]:
    """What storage says of a run that no cluster knows."""
    from eevp_batch.cluster.runs import open_output
    from eevp_batch.errors import EevpError
    from eevp_batch.storage.status import read_status

    state, progress = "unknown", None
    try:
        store = open_output(out)
        if store is not None:
            status = read_status(store)
            state = status.state
            progress = f"{status.rows_done:,} of {status.rows_total:,} rows"
    except (EevpError, OSError):
        pass  # a damaged output is not what a list is about
    return {
        "run_id": run_id,
        "submission_id": None,
        "name": name,
        "state": state,
        "progress": progress,
        "output": out,
        "started_unix_s": unix_s,
        "cluster": None,
    }


def _echo_table(rows: Sequence[dict[str, Any]]) -> None:
    names = ("run_id", "state", "progress", "cluster", "output")
    cells = [names, *([str(row[name] or "-") for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    fits = sum(widths) + 2 * len(widths) <= width()
    for row in cells:
        if fits or row is names:
            click.echo(
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            )
        else:
            click.echo(f"{row[0]}  {row[1]}  {row[2]}\n    {row[4]}  on {row[3]}")
