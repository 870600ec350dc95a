"""A Ray cluster's job server (its Jobs API): reached over HTTP, from anywhere, with a token.

A run of ours is a Ray job whose submission id is the run's id; when the same output is worked on
again, `.2`, `.3` and so on are added, for Ray takes each id once. What it is about stands in the
job's metadata.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from eevp_batch.cluster.addresses import api_server, unreachable
from eevp_batch.cluster.cluster_job import ClusterJob, ours
from eevp_batch.cluster.environment import environment
from eevp_batch.cluster.ray_safety import refuse_old_ray, refuse_open_dashboard
from eevp_batch.errors import ClusterError, UsageError

HEADERS = "RAY_JOB_HEADERS"
"""Environment variable with further headers as JSON, as Ray's own command line reads it."""

_CONNECT_S = 10.0
_ANSWER_S = 60.0
_LOG_CHARACTERS_PER_S = 200_000
_STARTING, _STARTING_S = "No available agent", 120.0  # what a cluster that comes up answers
_TELLING = ("client_builder", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")
_CERTIFICATES = "REQUESTS_CA_BUNDLE"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """What to run on the cluster, and what it asks for.

    Attributes:
        command: a shell command.
        runtime_env: see Ray's runtime environments.
        memory_bytes: none where 0.
    """

    command: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    cpus: float = 0.0
    memory_bytes: int = 0
    resources: dict[str, float] = field(default_factory=dict)


class JobServer:
    """The job server of a cluster.

    Attributes:
        address: as the job names it.
        url: of its dashboard.
        is_here: whether this machine is one of the cluster's nodes.

    Args:
        address: `auto`, ray:// or http(s)://.
        patience_s: how long to wait until somebody answers.

    Raises:
        ClusterError: it cannot be reached, it refused us, or it lets anybody in.
    """

    def __init__(self, address: str, patience_s: float = _CONNECT_S) -> None:
        self.address = address
        with self._told():
            with _quiet():
                found = api_server(address, patience_s)
            self.url, self.is_here = found.url, found.is_here
            _knock(self.url, patience_s)
            refuse_open_dashboard(self.url)
            self._client = _Client(
                self.url,
                headers=_headers(),
                verify=os.environ.get(_CERTIFICATES) or True,
            )
            refuse_old_ray(str(self._client._server_ray_version))

    def page(self, submission_id: str) -> str:
        """The address of a job's page in the dashboard."""
        return f"{self.url}/#/jobs/{submission_id}"

    def jobs(self) -> list[ClusterJob]:
        """Our runs, oldest first.

        Raises:
            ClusterError: it cannot be reached any more.
        """
        with self._told():
            found = [ours(details) for details in self._client.list_jobs()]
        return sorted(filter(None, found), key=lambda job: job.started_unix_s or 0.0)

    def of_run(self, run_id: str) -> list[ClusterJob]:
        """The jobs of one run, oldest first."""
        return [job for job in self.jobs() if run_id in (job.run_id, job.submission_id)]

    def of_output(self, out: str) -> list[ClusterJob]:
        """The jobs that write to one output folder, oldest first."""
        return [job for job in self.jobs() if job.output == out]

    def job(self, submission_id: str) -> ClusterJob:
        """One job as it is now.

        Raises:
            ClusterError: it is not there, or the server cannot be reached.
        """
        with self._told():
            found = ours(self._client.get_job_info(submission_id))
        if found is None:
            raise ClusterError(f"{self.url}: job {submission_id} is not one of eevp-batch")
        return found

    def submit(self, run_id: str, entry: EntryPoint) -> str:
        """Start a run.

        Returns:
            Its submission id.

        Raises:
            ClusterError: it cannot be reached, or does not take it.
        """
        taken = {job.submission_id for job in self.of_run(run_id)}
        names = [run_id, *(f"{run_id}.{number}" for number in range(2, len(taken) + 2))]
        submission_id = next(name for name in names if name not in taken)
        until_s = time.monotonic() + _STARTING_S
        while True:
            try:
                self._submit(submission_id, entry)
                return submission_id
            except ClusterError as error:
                if _STARTING not in str(error) or time.monotonic() > until_s:
                    raise
                time.sleep(2.0)

    def _submit(self, submission_id: str, entry: EntryPoint) -> None:
        with self._told(), _quiet():
            self._client.submit_job(
                entrypoint=entry.command,
                submission_id=submission_id,
                runtime_env=entry.runtime_env,
                metadata=entry.metadata,
                entrypoint_num_cpus=entry.cpus or None,
                entrypoint_memory=entry.memory_bytes or None,
                entrypoint_resources=entry.resources or None,
            )

    def stop(self, submission_id: str) -> None:
        """Send the entry point SIGTERM, and SIGKILL if it has not ended soon."""
        with self._told():
            self._client.stop_job(submission_id)

    def logs(self, submission_id: str) -> str:
        """What the entry point has written so far."""
        with self._told():
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str) -> Iterator[str]:
        """What the entry point writes, as it does, until its end.

        The server is asked again and again, the seldomer the more there is: a connection that
        stays open would not tell when the other side has gone. Nothing is told twice.

        Raises:
            ClusterError: the server cannot be reached for too long.
        """
        told = 0
        while True:
            # Before the log: what was written before the end is then in it.
            has_ended = self._patiently(lambda: self.job(submission_id)).has_ended
            text = self._patiently(lambda: self.logs(submission_id))
            if len(text) > told:
                yield text[told:]
                told = len(text)
            if has_ended:
                return
            time.sleep(1.0 + len(text) / _LOG_CHARACTERS_PER_S)

    def get(self, path: str, **parameters: Any) -> requests.Response:
        """Ask the dashboard for something that is not about jobs.

        Raises:
            ClusterError: it cannot be reached, or does not know it.
        """
        with self._told():
            answer = self._client._do_request("GET", path, params=parameters)
            if answer.status_code != requests.codes.ok:
                raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:200]}")
            return answer

    def _patiently(self, ask: Callable[[], _Answer], limit_s: float = 180.0) -> _Answer:
        until_s = time.monotonic() + limit_s
        while True:
            try:
                return ask()
            except ClusterError as error:
                if time.monotonic() > until_s:
                    error.add_note("the job may go on; `eevp-batch status OUT` reads its output")
                    raise
                time.sleep(5.0)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """One kind of error, in one line, for whatever Ray and HTTP raise."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError, RayError) as error:
            raise unreachable(self.address, "reached", error) from error


class _Client(JobSubmissionClient):
    """Ray's client with a time limit for every answer; Ray's own waits for ever."""

    def __init__(self, url: str, **options: Any) -> None:
        # The job names its cluster; these would replace it.
        with environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            super().__init__(url, **options)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(
            method, endpoint, **{"timeout": _ANSWER_S, **options}
        )
        return answer


def _headers() -> dict[str, str]:
    text = os.environ.get(HEADERS) or "{}"
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{HEADERS}: found no JSON object; allowed: {{name: value}}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's clients tell of every upload and connection."""
    loggers = [logging.getLogger(f"ray.{name}") for name in _TELLING]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _knock(url: str, patience_s: float) -> None:
    """Find out soon whether anybody is there."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), patience_s).close()
