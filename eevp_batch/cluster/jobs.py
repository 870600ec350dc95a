"""Run one job from its plan to its `_SUCCESS`, on a local Ray of its own."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray

from eevp_batch import __version__
from eevp_batch.cluster.coordinator import Coordinator
from eevp_batch.cluster.engine_loop import Build, RowEncoder, RowEngine
from eevp_batch.cluster.events import EventLog
from eevp_batch.cluster.fleet import Fleet, Resources
from eevp_batch.cluster.interrupts import Interrupts
from eevp_batch.cluster.local_ray import LocalRay, local_ray
from eevp_batch.cluster.phases import Phases
from eevp_batch.cluster.progress import Progress, Recoveries
from eevp_batch.errors import EevpError, JobFailedError, JobInterruptedError, UsageError
from eevp_batch.model_config import ModelConfig
from eevp_batch.records import ChunkStats
from eevp_batch.spec import ClusterSpec, JobSpec
from eevp_batch.storage.commit import Attempt, Committer
from eevp_batch.storage.learned import clean_learned
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.retries import NO_PATIENCE
from eevp_batch.storage.store import Store


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job that is done.

    Attributes:
        totals: all of the job's chunks, those that earlier runs committed included.
        totals_before: what earlier runs committed.
        chunks_before: how many chunks that were.
        wall_s: seconds of this run, from Ray's start to `_SUCCESS`.
        working_s: seconds of them from the first replica's readiness to the last commit.
        success: what `_SUCCESS` holds.
    """

    totals: ChunkStats
    totals_before: ChunkStats
    chunks: int
    chunks_before: int
    wall_s: float
    working_s: float
    recoveries: Recoveries
    success: dict[str, Any]


def run_job(
    spec: JobSpec,
    model: ModelConfig,
    plan: Plan,
    store: Store,
    build: Build | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    dashboard: bool | None = None,
) -> JobResult:
    """Generate for every chunk of the plan that is not committed yet, verify, write `_SUCCESS`.

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

    Raises:
        JobInterruptedError: SIGINT or SIGTERM; what is committed stays, running again resumes.
        TooManyErrorsError: more rows failed than `run.max_error_rate` allows.
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
    )
    with run.committer.lock(), Interrupts() as interrupts:
        return run.run(interrupts)


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
    ) -> None:
        self.spec, self.model, self.plan, self.store = spec, model, plan, store
        self.build, self.dashboard = build, dashboard
        self.on_progress, self.on_message = on_progress, on_message
        self.committer = Committer(store, plan)
        self.events = EventLog(store)
        self.started_s = time.monotonic()
        self.coordinator: Coordinator | None = None

    def run(self, interrupts: Interrupts) -> JobResult:
        """Do it, and leave the end of it in the event log whatever it is."""
        try:
            return self._run(interrupts)
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except EevpError as error:
            self._write_end("job_failed", reason=f"{type(error).__name__}: {error}")
            raise
        except OSError as error:
            self._write_end("job_failed", reason=f"{type(error).__name__}: {error}")
            raise JobFailedError(f"{self.store.text}: {error}") from error

    def _run(self, interrupts: Interrupts) -> JobResult:
        self.committer.clean_attempts()
        clean_learned(self.store)
        done, before = self.committer.committed(), self.committer.totals()
        self.events.write(
            "job_resumed" if done else "job_started",
            chunks=len(self.plan.chunks),
            chunks_committed=len(done),
            replicas=self.spec.cluster.replicas,
            pid=os.getpid(),
        )
        if len(done) == len(self.plan.chunks):
            return self._finish(before, before, len(done), 0.0, Recoveries())
        with local_ray(_cpus_to_offer(self.spec.cluster), self.dashboard) as local:
            if local.dashboard_url:
                self.on_message(f"Ray dashboard: {local.dashboard_url}")
            coordinator = self._coordinate(interrupts, local, done, before)
        return self._finish(
            coordinator.totals, before, len(done), coordinator.working_s, coordinator.recoveries
        )

    def _coordinate(
        self, interrupts: Interrupts, local: LocalRay, done: set[int], before: ChunkStats
    ) -> Coordinator:
        """Run the coordinator on a fleet that ends with it."""
        resources = replica_resources(self.spec.cluster, _offered())
        # A replica gets each chunk with its lease; the list of all of them may be large.
        small_plan = replace(self.plan, chunks=[])
        job = (self.spec, self.model, small_plan, self.store.text)
        build = self.build or partial(_load, *job, resources.num_threads)
        fleet = Fleet(
            namespace=self.plan.run_id,
            size=self.spec.cluster.replicas,
            resources=resources,
            arguments=(build, self.spec, small_plan, self.store.text),
            stderr_tail=local.tail,
        )
        coordinator = Coordinator(
            spec=self.spec,
            plan=self.plan,
            fleet=fleet,
            committer=self.committer,
            events=self.events,
            done=done,
            totals=before,
            on_progress=self.on_progress,
            on_message=self.on_message,
            phases=Phases(self.spec, self.plan, self.store, self._attempts()),
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
            "replicas": self.spec.cluster.replicas,
            "chunks_before": chunks_before,
            "working_s": round(working_s, 3),
            **asdict(recoveries),
        }
        success = self.committer.finish(run_info)
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
        events = EventLog(self.store.with_patience(NO_PATIENCE))
        with contextlib.suppress(OSError):  # storage may be what failed; the error is told anyway
            events.write(
                event, reason=reason, chunks_committed=committed, wall_s=round(self._wall_s, 3)
            )


def replica_resources(cluster: ClusterSpec, offered: dict[str, float]) -> Resources:
    """What each replica asks of Ray; `auto` shares out what there is.

    CPUs: an equal share in whole cores, one at least. GPUs: one each; replicas share where there
    are fewer GPUs than replicas; none where there is none.

    Args:
        cluster: what the job says.
        offered: Ray's resources, `CPU` and `GPU` among them.

    Raises:
        UsageError: the job asks for more than there is, so that a replica would wait for ever.
    """
    cpus, gpus = offered.get("CPU", 0.0), offered.get("GPU", 0.0)
    if cluster.cpus_per_replica == "auto":
        num_cpus = max(1.0, float(cpus // cluster.replicas))
    else:
        num_cpus = cluster.cpus_per_replica
    if cluster.gpus_per_replica == "auto":
        num_gpus = min(1.0, gpus / cluster.replicas)
    else:
        num_gpus = cluster.gpus_per_replica
    for name, each, there in (("cpus", num_cpus, cpus), ("gpus", num_gpus, gpus)):
        if each * cluster.replicas > there + 1e-6:
            raise UsageError(
                f"cluster.{name}_per_replica: found {each:g} for each of {cluster.replicas} "
                f"replicas; allowed: {there:g} in all, which is what Ray has here"
            )
    return Resources(num_cpus=num_cpus, num_gpus=num_gpus)


def _cpus_to_offer(cluster: ClusterSpec) -> int:
    """Logical CPUs of a local Ray: this process's cores, and more where the job asks for more."""
    each = 1.0 if cluster.cpus_per_replica == "auto" else cluster.cpus_per_replica
    return max(len(os.sched_getaffinity(0)), math.ceil(cluster.replicas * each))


def _offered() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _load(
    spec: JobSpec, model: ModelConfig, plan: Plan, store_text: str, num_threads: int
) -> tuple[RowEngine, RowEncoder]:
    # Imported in the replica only: the driver needs no torch.
    from eevp_batch.cluster.engines import load_engines

    return load_engines(spec, model, plan, store_text, num_threads)


def _print_message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
