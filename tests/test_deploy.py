"""How `jobs.deploy` bears a dashboard that resets, hangs, or wants another token: Ray's client on a server of ours."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jobs.deploy import Deployment
from meanet.errors import UserError

CONFIG = {"applications": [{"name": "meanet", "import_path": "serve_apps.graph:app"}]}
RUNNING = {
    "applications": {"meanet": {"status": "RUNNING", "deployments": {}}},
    "http_options": {"host": "127.0.0.1", "port": 8000},
}
RESET = "reset"
HANG = "hang"


class Dashboard(ThreadingHTTPServer):
    """Answers each request by what is next in line for it, the last for all that follow."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version: Any = {"ray_version": "2.60.0"}
        self.lines: dict[str, list[Any]] = {"PUT": [{}], "GET": [RUNNING]}
        self.deployed: list[Any] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def _answer(self, what: Any) -> None:
        if what == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if what == HANG:
            self.server.over.wait(60)
            return
        status, body = (what, "Unauthorized") if isinstance(what, int) else (200, json.dumps(what))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def _next(self, method: str) -> Any:
        line = self.server.lines[method]
        return line.pop(0) if len(line) > 1 else line[0]

    def do_GET(self) -> None:
        self._answer(self.server.version if self.path == "/api/ray/version" else self._next("GET"))

    def do_PUT(self) -> None:
        self.server.deployed.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(self._next("PUT"))

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a connection that was reset cannot be flushed
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def test_what_runs_is_answered_with_its_url(dashboard: Dashboard) -> None:
    assert Deployment(dashboard.url, CONFIG, 20).run() == "http://127.0.0.1:8000"
    assert dashboard.deployed == [CONFIG]


def test_a_reset_connection_is_outwaited(dashboard: Dashboard) -> None:
    dashboard.lines = {"PUT": [RESET, {}], "GET": [RESET, 503, RESET, RUNNING]}
    assert Deployment(dashboard.url, CONFIG, 30).run() == "http://127.0.0.1:8000"
    assert dashboard.deployed == [CONFIG] * 2
    assert dashboard.lines["GET"] == [RUNNING]


def test_resets_are_not_outwaited_for_ever(dashboard: Dashboard) -> None:
    dashboard.lines["GET"] = [RESET]
    with pytest.raises(UserError, match=r"not deployed after 1 s: the dashboard does not answer \(.*reset by peer"):
        Deployment(dashboard.url, CONFIG, 1).run()


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_dashboard_that_hangs_blocks_no_longer_than_it_may(method: str, dashboard: Dashboard) -> None:
    dashboard.lines[method] = [HANG]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"not deployed after 1 s: the dashboard does not answer \(.*timed out"):
        Deployment(dashboard.url, CONFIG, 1).run()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("version", "says"), [(HANG, "timed out"), (RESET, "Failed to connect"), (500, "500")])
def test_a_dashboard_that_does_not_come_up_is_named(version: Any, says: str, dashboard: Dashboard) -> None:
    dashboard.version = version
    with pytest.raises(
        UserError, match=f"no Ray dashboard answers at {dashboard.url} .*{says}.* RAY_DASHBOARD_ADDRESS"
    ):
        Deployment(dashboard.url, CONFIG, 1)


@pytest.mark.parametrize(("status", "says"), [(401, "Authentication required"), (403, "Authentication failed")])
@pytest.mark.parametrize("where", ["version", "PUT", "GET"])
def test_a_missing_or_wrong_token_is_one_line_with_the_remedy(
    where: str, status: int, says: str, dashboard: Dashboard
) -> None:
    if where == "version":
        dashboard.version = status
    else:
        dashboard.lines[where] = [status]
    with pytest.raises(UserError, match=f"at {dashboard.url} wants the cluster's token .{says}") as caught:
        Deployment(dashboard.url, CONFIG, 20).run()
    assert "RAY_AUTH_TOKEN_PATH" in str(caught.value)
    assert "\n" not in str(caught.value)
