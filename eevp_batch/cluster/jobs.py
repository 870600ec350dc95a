"""Run one job from its plan to its `_SUCCESS`, on a Ray of its own or on a cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

from eevp_batch import __version__
from eevp_batch.cluster import rules
from eevp_batch.cluster.addresses import to_join
from eevp_batch.cluster.attached_ray import attached_ray
from eevp_batch.cluster.backlog import Backlog
from eevp_batch.cluster.coordinator import Coordinator
from eevp_batch.cluster.engine_loop import Build
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet
from eevp_batch.cluster.interrupts import Interrupts
from eevp_batch.cluster.job_page import JobPage, submission_id
from eevp_batch.cluster.job_result import JobResult
from eevp_batch.cluster.local_ray import LocalRay, local_ray
from eevp_batch.cluster.metrics import JobMetrics
from eevp_batch.cluster.node_paths import check_nodes, job_paths
from eevp_batch.cluster.own_node import loader
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.progress import Progress, Recoveries
from eevp_batch.cluster.ray_names import job_metadata
from eevp_batch.cluster.resources import cpus_to_offer, fleet_size, offered, replica_resources
from eevp_batch.errors import EevpError, JobFailedError, JobInterruptedError
from eevp_batch.model_config import ModelConfig
from eevp_batch.records import ChunkStats
from eevp_batch.spec import JobSpec
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.learned import clean_learned
from eevp_batch.storage.patches import find_patches
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.repair import set_damage_aside
from eevp_batch.storage.retries import NO_PATIENCE
from eevp_batch.storage.store import Store

__all__ = ["JobResult", "run_job"]


def run_job(
    spec: JobSpec,
    model: ModelConfig,
    plan: Plan,
    store: Store,
    build: Build | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    dashboard: bool | None = None,
    retry: Sequence[str] | None = None,
    repairs: bool = False,
    is_inside: bool = False,
    stop_within_s: float | None = None,
) -> JobResult:
    """Generate for every chunk of the plan that is not committed yet, verify, write `_SUCCESS`.

    Or try error rows again: then `_SUCCESS` is written where the job was done but for these.

    Args:
        spec: the job.
        model: its model.
        store: its output folder.
        plan: what `open_plan` gave for `store`.
        build: makes a replica's engine and encoder; by default those of the job's model.
        on_progress: called about once a second.
        on_message: told what a person wants to know as it happens; prints to stderr by default.
        dashboard: whether a local Ray serves its dashboard; by default unless the environment has
            EEVP_DASHBOARD=0.
        retry: try only rows in error again, those of these classes; empty: all but skipped rows.
        repairs: whether chunks whose parts or records are damaged are done again.
        is_inside: whether this process was started on a cluster in order to run the job there.
        stop_within_s: see `Interrupts`.

    Raises:
        SpecError: a node of the cluster does not see a path of the job.
        JobInterruptedError: SIGINT or SIGTERM; what is committed stays, running again resumes.
        TooManyErrorsError: more rows failed than `run.max_error_rate` or `run.max_errors` allow;
            running again with a higher limit resumes.
        JobFailedError: replicas kept dying, their code failed, or storage did.
        UsageError: another process runs this job, or the machine lacks what a replica asks for.
        VerifyFailedError: the output does not account for every row.
    """
    run = _Run(
        spec=spec,
        model=model,
        plan=plan,
        store=store,
        build=build,
        on_progress=on_progress or (lambda progress: None),
        on_message=on_message or _print_message,
        dashboard=os.environ.get("EEVP_DASHBOARD") != "0" if dashboard is None else dashboard,
        retry=retry,
        repairs=repairs,
        is_inside=is_inside,
    )
    try:
        interrupts = Interrupts(stop_within_s)
        with run.committer.lock(), interrupts, interrupts.heeding(store):
            return run.run(interrupts)
    except OSError as error:
        raise JobFailedError(f"{store.text}: {error}") from error


class _Run:
    """One run of a job; its attributes are the arguments of `run_job`."""

    def __init__(
        self,
        spec: JobSpec,
        model: ModelConfig,
        plan: Plan,
        store: Store,
        build: Build | None,
        on_progress: Callable[[Progress], None],
        on_message: Callable[[str], None],
        dashboard: bool,
        retry: Sequence[str] | None,
        repairs: bool,
        is_inside: bool,
    ) -> None:
        self.named_address = spec.cluster.address
        joined = to_join(self.named_address, is_inside)
        cluster = spec.cluster.model_copy(update={"address": joined})
        self.spec = spec.model_copy(update={"cluster": cluster})
        self.model, self.plan, self.store = model, plan, store
        self.build, self.dashboard = build, dashboard
        self.retry, self.repairs = retry, repairs
        self.on_progress, self.on_message = on_progress, on_message
        self.committer = Committer(store, plan)
        self.events = EventLog(store)
        self.started_s = time.monotonic()
        self.coordinator: Coordinator | None = None
        self.metadata = job_metadata(plan.run_id, store.text)
        self.page = JobPage(self.metadata)
        self.metrics = JobMetrics(spec.name, plan.run_id)

    def run(self, interrupts: Interrupts) -> JobResult:
        """Do it, and leave the end of it in the event log whatever it is."""
        try:
            return self._run(interrupts)
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except (EevpError, OSError) as error:
            self._write_end("job_failed", reason=f"{type(error).__name__}: {error}")
            raise

    def _repair(self) -> None:
        """Set damaged chunks aside, and say which and why."""
        count = 0
        for found in set_damage_aside(self.store, self.plan):
            count += 1
            fields = {"problems": found.problems, "records": found.records}
            self.events.write("chunk_set_aside", chunk_id=found.chunk_id, **fields)
            self.on_message(f"repair: {found.text}")
        if not count:
            self.on_message("repair: no chunk is damaged")

    def _run(self, interrupts: Interrupts) -> JobResult:
        if self.repairs:
            self._repair()
        self.committer.clean_attempts()
        clean_learned(self.store)
        done, before = self.committer.committed(), self.committer.totals()
        phases = Phases(self.spec, self.plan, self.store, self._attempts)
        backlog = self._backlog(phases, done)
        self._write_start(backlog, len(done))
        if not backlog.num_chunks:
            return self._finish(before, before, len(done), 0.0, Recoveries())
        if backlog.is_retry:
            self.committer.reopen()
        else:
            rules.check_errors(before, self.spec.run, self.plan.num_rows)
        with self._ray() as local:
            if local.dashboard_url:
                self.on_message(f"Ray dashboard: {local.dashboard_url}")
                self.on_message(f"targets for Prometheus: {local.targets}")
            num_done = 0 if backlog.is_retry else len(done)
            coordinator = self._coordinate(interrupts, local, backlog, phases, num_done, before)
        return self._finish(
            coordinator.totals, before, len(done), coordinator.working_s, coordinator.recoveries
        )

    def _backlog(self, phases: Phases, done: set[int]) -> Backlog:
        """What there is to do."""
        max_attempts = self.spec.run.max_attempts
        if self.retry is not None:
            patches = {p.chunk_id: p for p in find_patches(self.committer, self.retry)}
            if not patches:
                kind = f" of class {' or '.join(self.retry)}" if self.retry else ""
                self.on_message(f"no row in error{kind} is there to be tried again")
            return Backlog.retry(self.plan, patches, max_attempts)
        to_do = (chunk_id for chunk_id in phases.order() if chunk_id not in done)
        return Backlog(self.plan, to_do, len(self.plan.chunks) - len(done), max_attempts)

    def _write_start(self, backlog: Backlog, num_done: int) -> None:
        facts = {
            "replicas": self.spec.cluster.max_replicas,
            "pid": os.getpid(),
            "address": self.named_address,
            "submission_id": submission_id(),
        }
        if self.retry is not None:
            rows = backlog.retried_rows
            self.events.write("retry_started", chunks=backlog.num_chunks, rows=rows, **facts)
            return
        self.events.write(
            "job_resumed" if num_done else "job_started",
            chunks=len(self.plan.chunks),
            chunks_committed=num_done,
            **facts,
        )

    def _ray(self) -> AbstractContextManager[LocalRay]:
        cluster = self.spec.cluster
        if cluster.address is not None:
            return attached_ray(cluster.address, self.metadata)
        return local_ray(cpus_to_offer(cluster), self.dashboard, self.metadata)

    def _coordinate(
        self,
        interrupts: Interrupts,
        local: LocalRay,
        backlog: Backlog,
        phases: Phases,
        num_done: int,
        before: ChunkStats,
    ) -> Coordinator:
        """Run the coordinator on a fleet that ends with it."""
        cluster, nodes = self.spec.cluster, offered()
        resources = replica_resources(cluster, nodes)
        # A replica gets each chunk with its lease; the list of all of them may be large.
        small_plan = replace(self.plan, chunks=[])
        job = (self.spec, self.model, small_plan, self.store.text)
        build = self.build or loader(*job, resources)
        if cluster.address is not None:  # a Ray of our own is one node
            check_nodes(job_paths(self.spec, self.plan, self.store), resources)
        fleet = Fleet(
            # Of this run alone: replicas of a driver that was killed may still be ending.
            namespace=f"{self.plan.run_id}.{uuid.uuid4().hex[:8]}",
            size=fleet_size(cluster, nodes, resources),
            resources=resources,
            arguments=(build, self.spec, small_plan, self.store.text),
            stderr_tail=local.tail,
            head=local.head,
        )
        coordinator = Coordinator(
            spec=self.spec,
            plan=self.plan,
            fleet=fleet,
            committer=self.committer,
            events=self.events,
            backlog=backlog,
            num_done=num_done,
            totals=before,
            on_progress=self._tell_progress,
            on_message=self.on_message,
            phases=phases,
        )
        self.coordinator = coordinator
        interrupts.drain_with(coordinator.drain)
        try:
            coordinator.run()
        finally:
            fleet.close()
        if not coordinator.is_finished:
            raise KeyboardInterrupt
        return coordinator

    def _tell_progress(self, found: Progress) -> None:
        """To Prometheus, to the Ray dashboard, and to whoever asked for it."""
        if self.coordinator is not None:
            self.metrics.publish(found, self.coordinator.totals, self.coordinator.recoveries)
        self.page.tell(found)
        self.on_progress(found)

    def _attempts(self) -> Iterator[Attempt]:
        return (record.attempt for record in self.committer.records())

    def _finish(
        self,
        totals: ChunkStats,
        before: ChunkStats,
        chunks_before: int,
        working_s: float,
        recoveries: Recoveries,
    ) -> JobResult:
        run_info = {
            "eevp_batch": __version__,
            "replicas": self.spec.cluster.max_replicas,
            "chunks_before": chunks_before,
            "working_s": round(working_s, 3),
            **asdict(recoveries),
        }
        rules.check_errors(totals, self.spec.run, self.plan.num_rows)
        is_done = self.retry is None or chunks_before == len(self.plan.chunks)
        if not is_done:
            left = len(self.plan.chunks) - chunks_before
            self.on_message(f"{left} chunks of the job are still to do; `submit` goes on with them")
        success = self.committer.finish(run_info) if is_done else {}
        self.events.write(
            "job_finished",
            wall_s=round(self._wall_s, 3),
            rows_ok=totals.rows_ok,
            rows_error=totals.rows_error,
            generated_tokens=totals.generated_tokens,
            replica_deaths=recoveries.replica_deaths,
        )
        return JobResult(
            totals=totals,
            totals_before=before,
            chunks=len(self.plan.chunks),
            chunks_before=chunks_before,
            wall_s=self._wall_s,
            working_s=working_s,
            recoveries=recoveries,
            success=success,
        )

    @property
    def _wall_s(self) -> float:
        return time.monotonic() - self.started_s

    def _interrupted(self) -> JobInterruptedError:
        self._write_end("job_interrupted", reason="signal")
        committed = self.coordinator.num_committed if self.coordinator else 0
        return JobInterruptedError(
            f"interrupted with {committed} of {len(self.plan.chunks)} chunks committed; "
            "the same command goes on from there"
        )

    def _write_end(self, event: str, reason: str) -> None:
        committed = self.coordinator.num_committed if self.coordinator else 0
        events = self.events.on(self.store.with_patience(NO_PATIENCE))
        with contextlib.suppress(OSError):  # storage may be what failed; the error is told anyway
            events.write(
                event, reason=reason, chunks_committed=committed, wall_s=round(self._wall_s, 3)
            )


def _print_message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
