"""A real S3 endpoint on loopback, moto's server, that can be told to misbehave.

moto honours `If-None-Match: *` on PUT: it answers 412 where the name is taken. But it looks first
and writes later, and between the two another request may do the same; on S3 they are one act, and
here PUTs come one at a time to make them one.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

BUCKET = "bucket"

Fault = Literal["500", "503", "hang", "lost", "cut"]
FAULTS: tuple[Fault, ...] = ("500", "503", "hang", "lost", "cut")

_BODY = b"<Error><Code>%s</Code><Message>injected</Message></Error>"
_CODES = {"500": b"InternalError", "503": b"ServiceUnavailable"}


@dataclass
class _Plan:
    """Faults for the requests that `matches` says yes to, in order."""

    matches: Callable[[str, str], bool]
    faults: list[Fault]


@dataclass
class FaultyApp:
    """A WSGI application before which, and after which, things go wrong.

    - `500`, `503`: nothing is done, and the server says so.
    - `hang`: nothing is done and nothing is said for `hang_s`; then the connection is closed.
    - `lost`: the request is done, and the connection closed without an answer.
    - `cut`: the request is done, and the connection closed in the middle of the answer's body.

    Attributes:
        injected: the faults so far, each with the request that it hit.
        requests: every request so far.
    """

    app: Any
    hang_s: float = 6.0
    injected: list[tuple[Fault, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _plans: list[_Plan] = field(default_factory=list)
    _share: float = 0.0
    _kinds: tuple[Fault, ...] = ()
    _random: random.Random = field(default_factory=random.Random)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _putting: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, method: str, part: str, *faults: Fault) -> None:
        """Let the next requests of a method whose path or query has `part` in it go wrong."""
        self._plans.append(_Plan(lambda m, path: m == method and part in path, list(faults)))

    def at_random(self, share: float, kinds: Iterable[Fault], seed: int) -> None:
        """Let a share of all requests go wrong."""
        self._share, self._kinds, self._random = share, tuple(kinds), random.Random(seed)

    def heal(self) -> None:
        """Let everything go right again, and forget what happened."""
        self._plans, self._share = [], 0.0
        self.injected, self.requests = [], []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        target = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        fault = self._next_fault(environ["REQUEST_METHOD"], target)
        if fault is None:
            return self._serve(environ, start_response)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if fault in _CODES:
            environ["wsgi.input"].read(length)
            start_response(f"{fault} injected", [("Content-Type", "application/xml")])
            return [_BODY % _CODES[fault]]
        if fault == "hang":
            time.sleep(self.hang_s)
            return _hang_up(environ, start_response)
        answer = _Answer()
        body = b"".join(self._serve(environ, answer))
        if fault == "lost" or not body:
            return _hang_up(environ, start_response)
        start_response(answer.status, answer.headers)
        return _half(body, environ)

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._putting if environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return self.app(environ, start_response)  # type: ignore[no-any-return]

    def _next_fault(self, method: str, target: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {target}")
            fault: Fault | None = None
            for plan in self._plans:
                if plan.faults and plan.matches(method, target):
                    fault = plan.faults.pop(0)
                    break
            if fault is None and self._random.random() < self._share:
                fault = self._random.choice(self._kinds)
            if fault is not None:
                self.injected.append((fault, f"{method} {target}"))
            return fault


class _Answer:
    """Keeps what an application would have answered."""

    status = ""
    headers: list[tuple[str, str]] = []  # noqa: RUF012

    def __call__(self, status: str, headers: list[tuple[str, str]], error: Any = None) -> None:
        self.status, self.headers = status, headers


def _hang_up(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    _close(environ)
    start_response("200 nobody reads this", [])
    return []


def _close(environ: dict[str, Any]) -> None:
    with suppress(OSError):  # the client has given up already
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def _half(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _close(environ)


@dataclass(frozen=True)
class S3Server:
    """The endpoint, as a user names it."""

    port: int
    faults: FaultyApp

    def uri(self, path: str) -> str:
        """Where `path` is in the bucket; credentials come from the environment."""
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://{BUCKET}/{quote(path)}?{options}"


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serve a bucket in memory while the block runs."""
    from moto.backends import get_backend
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    get_backend("s3").reset()
    faults = FaultyApp(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="s3-server", daemon=True)
    thread.start()
    try:
        _make_bucket(server.server_port)
        yield S3Server(server.server_port, faults)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _make_bucket(port: int) -> None:
    import boto3

    endpoint = f"http://127.0.0.1:{port}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
