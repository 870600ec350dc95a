"""Old Rays and open dashboards are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from eevp_batch.cluster.ray_safety import refuse_old_ray, refuse_open_dashboard
from eevp_batch.errors import ClusterError


@pytest.mark.parametrize("version", ["2.51.2", "1.99.0", "2.9.0", "nightly"])
def test_an_old_ray_is_refused(version: str) -> None:
    with pytest.raises(ClusterError, match=r"Ray: found version .*; allowed: 2\.52 or newer"):
        refuse_old_ray(version)


@pytest.mark.parametrize("version", ["2.52.0", "2.60.1", "3.0.0.dev0"])
def test_a_newer_one_is_not(version: str) -> None:
    refuse_old_ray(version)


@pytest.fixture(params=[200, 401])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Something that answers every request with a status; the status and its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        yield request.param, server.server_address[1]
        server.shutdown()


def test_a_dashboard_that_asks_nobody_for_a_token_is_refused(
    dashboard: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, port = dashboard
    monkeypatch.delenv("EEVP_ALLOW_OPEN_RAY", raising=False)
    refuse_open_dashboard(f"127.0.0.1:{port}")
    refuse_open_dashboard(f"localhost:{port}")
    refuse_open_dashboard(None)
    refuse_open_dashboard(f"http://127.0.0.1:{port}")
    public = [f"0.0.0.0:{port}", f"http://0.0.0.0:{port}"]
    for url in public if status == 200 else ():
        with pytest.raises(ClusterError, match="found no token authentication"):
            refuse_open_dashboard(url)
    monkeypatch.setenv("EEVP_ALLOW_OPEN_RAY", "1" if status == 200 else "0")
    for url in public:
        refuse_open_dashboard(url)


def test_a_dashboard_that_is_not_there_is_not_refused() -> None:
    refuse_open_dashboard("0.0.0.0:1")
