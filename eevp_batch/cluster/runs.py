"""Which run a person means by a run id or an output folder, and where it can be asked about.

Ray is imported only where a cluster is asked: an output folder answers without it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eevp_batch.cluster.addresses import default_address, is_submitted
from eevp_batch.errors import ClusterError, UsageError, first_line
from eevp_batch.history import Submission, recall
from eevp_batch.storage import layout
from eevp_batch.storage.plan import read_plan
from eevp_batch.storage.retries import Patience
from eevp_batch.storage.status import RUN_STARTS, read_events
from eevp_batch.storage.store import Store

if TYPE_CHECKING:
    from eevp_batch.cluster.cluster_job import ClusterJob
    from eevp_batch.cluster.job_server import JobServer

_STORAGE_S = 10.0
_CONNECT_S = 3.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run.

    Attributes:
        out: its output folder or URI; empty where unknown.
        store: its output; None where it cannot be read from here.
        server: the job server of its cluster; None where it has none, or cannot be asked.
        job: the run as that server knows it; None where it does not.
        lost: why the cluster cannot be asked; None where it can, and where there is none.
    """

    run_id: str
    out: str
    store: Store | None
    server: JobServer | None = None
    job: ClusterJob | None = None
    lost: str | None = None


def find_run(text: str, address: str | None = None) -> Run:
    """Find a run.

    Args:
        text: run id, submission id, output folder or URI.
        address: of its cluster; None: where it was submitted to.

    Raises:
        UsageError: nobody knows such a run.
        ClusterError: it is known to a cluster only, and that cannot be reached.
    """
    store = open_output(text)
    if store is not None:
        return _on_cluster(store, read_plan(store).run_id, address or _last_address(store))
    known = _remembered(text)
    store = open_output(known.out) if known else None
    if known is not None and store is not None:
        return _on_cluster(store, known.run_id, address or known.address)
    return _known_to_cluster(text, address, known)


def find_output(text: str, address: str | None = None) -> tuple[Store, ClusterJob | None]:
    """The output of a run; with what its cluster knows of it where it cannot be read from here.

    Args:
        text: run id, submission id, output folder or URI.
        address: of its cluster; None: where it was submitted to.

    Raises:
        UsageError: nobody knows such a run.
        ClusterError: it is known to a cluster only, and that cannot be reached.
    """
    known = None if open_output(text) else _remembered(text)
    store = open_output(known.out if known else text)
    if store is not None:
        return store, None
    if known is None and address is None and default_address() is None:
        return Store.open(text), None  # and say that it holds no job
    found = _known_to_cluster(text, address, known)
    if found.store is not None:
        return found.store, None
    if found.job is None:
        raise UsageError(f"{text}: found neither its output nor a cluster that knows it")
    return Store.open(found.out), found.job


def _known_to_cluster(text: str, address: str | None, known: Submission | None) -> Run:
    from eevp_batch.cluster.job_server import JobServer

    if known is not None and is_submitted(address or known.address):
        server = JobServer(str(address or known.address))
        return Run(known.run_id, known.out, None, server, _latest(server.of_run(known.run_id)))
    there = address or default_address()
    if there is None:
        raise UsageError(
            f"{text}: found neither an output folder with a job nor a run that was submitted from "
            "here; allowed: one of these, or --address of the cluster that knows it"
        )
    server = JobServer(there)
    jobs = server.of_run(text) or server.of_output(os.path.abspath(text)) or server.of_output(text)
    job = _latest(jobs)
    if job is None:
        raise UsageError(
            f"{text}: found no such run on {server.url}; allowed: one of those `list`s"
        )
    return Run(job.run_id, job.output, open_output(job.output), server, job)


def open_output(out: str) -> Store | None:
    """An output folder that holds a job and can be read from here; None for anything else.

    Args:
        out: folder or URI.
    """
    try:
        store = Store.open(out)
        impatient = store.with_patience(Patience(total_s=_STORAGE_S))
        return store if impatient.exists(layout.PLAN) else None
    except (OSError, UsageError):
        return None


def known_jobs(addresses: Sequence[str]) -> tuple[list[tuple[JobServer, ClusterJob]], list[str]]:
    """Our runs on some clusters, and why some of these cannot be asked.

    Args:
        addresses: of the clusters.
    """
    from eevp_batch.cluster.job_server import JobServer

    found: list[tuple[JobServer, ClusterJob]] = []
    lost: list[str] = []
    for address in dict.fromkeys(addresses):
        try:
            server = JobServer(address, _CONNECT_S)
            found += [(server, job) for job in server.jobs()]
        except ClusterError as error:
            lost.append(first_line(error))
    return found, lost


def last_start(store: Store) -> dict[str, Any]:
    """The event with which the last run of a job began; empty before the first."""
    event: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for event_now in read_events(store):
            if event_now.get("event") in RUN_STARTS:
                event = event_now
    return event


def _on_cluster(store: Store, run_id: str, address: str | None) -> Run:
    """A run whose output can be read, with what its cluster knows of it."""
    from eevp_batch.cluster.job_server import JobServer

    out = store.text
    if address is None or not is_submitted(address):
        return Run(run_id, out, store)
    try:
        server = JobServer(address, _CONNECT_S)
        job = _latest(server.of_run(run_id) or server.of_output(out))
    except ClusterError as error:
        return Run(run_id, out, store, lost=first_line(error))
    lost = None if job else f"{server.url} does not know {run_id}"
    return Run(run_id, out, store, server if job else None, job, lost)


def _last_address(store: Store) -> str | None:
    """The cluster that a job was submitted to last; None where it ran without one."""
    event = last_start(store)
    address = event.get("address") if event.get("submission_id") else None
    return address if isinstance(address, str) else None


def _remembered(text: str) -> Submission | None:
    names = (text, os.path.abspath(text))
    for entry in reversed(recall()):
        if text in (entry.run_id, entry.submission_id) or entry.out in names:
            return entry
    return None


def _latest(jobs: Sequence[ClusterJob]) -> ClusterJob | None:
    return jobs[-1] if jobs else None
