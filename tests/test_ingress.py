"""The ingress of a server of one's own: what is set before Ray starts, and that HAProxy is what listens."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ENVIRONMENT
from server import serving

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.tracking import MODEL as REGISTERED
from meanet.tracking import Tracker
from serve_apps import http, ingress


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        monkeypatch.delenv(name)


def test_two_servers_share_neither_ports_nor_files(tmp_path: Path) -> None:
    one, two = (ingress.variables(tmp_path / name) for name in ("one", "two"))
    for variables in (one, two):
        assert variables.items() >= ingress.NODES.items()
    for name in ("STATS_PORT", "METRICS_PORT"):
        assert one[f"RAY_SERVE_HAPROXY_{name}"] != two[f"RAY_SERVE_HAPROXY_{name}"]
    for name in (name for name, value in one.items() if value.startswith(str(tmp_path))):
        assert one[name] != two[name]
    first, last = (int(one[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX"))
    assert 10_000 < first < last < 32_768, "beside the kernel's own choice and Ray's workers"


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "12345")
    before = dict(os.environ)
    with ingress.prepared() as reason:
        assert reason is None
        assert os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "12345", "what an operator has set stays"
        folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert folder.stat().st_mode & 0o077 == 0, "the admin socket in it is nobody else's"
    assert dict(os.environ) == before
    assert not folder.exists()


def test_where_haproxy_cannot_run_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "nothing"))
    with ingress.prepared() as reason:
        assert reason is not None
        assert "nothing" in reason
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with ingress.prepared() as reason:
        assert reason == "RAY_SERVE_ENABLE_HA_PROXY is not 1"


def test_replicas_import_neither_torch_nor_mlflow() -> None:
    """An edge's replica holds 140 MB without them, and 460 with."""
    words = "import sys, serve_apps.graph; print({'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", words], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_protocols_name_the_registered_model() -> None:
    assert http.MODEL == REGISTERED


def lines_of_edge(uri: str, event: str) -> set[tuple[str, int]]:
    """(request id, status) of an event's JSON lines on the standard error of the edge replica of that store."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            of_edge = process.joinpath("cmdline").read_bytes().startswith(b"ray::ServeReplica:meanet:edge")
            if of_edge and f"MLFLOW_TRACKING_URI={uri}".encode() in process.joinpath("environ").read_bytes():
                text = Path(os.readlink(process / "fd" / "2")).read_text()
                found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
                return {(line["request_id"], line["status"]) for line in found if line["event"] == event}
    raise AssertionError("there is no edge replica")


@pytest.mark.cluster
def test_haproxy_listens_and_the_fast_path_answers(model: TrainedModel, splits: Splits, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(uri)
    tracker.promote(tracker.register(model, tracker.start_run("r", {}, {})))
    body = encode_png(splits.table.images[splits.test[0]])
    with serving(tmp_path, uri, "--access-log") as url, httpx.Client(base_url=url, timeout=30) as client:
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                commands.append(path.read_bytes())
        assert any(b"haproxy" in command.split(b"\0")[0] and b"meanet-ha-" in command for command in commands)
        deadline = time.monotonic() + 30
        while "-" in (fast := client.post("/v1/classify?edge_only=true", content=body)).headers["x-request-id"]:
            assert time.monotonic() < deadline, "all are handled by Serve, whose ids have dashes"
            time.sleep(0.1)  # HAProxy asks Serve's proxy while it has not heard of the replica
        slow = client.post("/v1/classify?edge_only=1", content=body)
        assert fast.status_code == slow.status_code == 200
        ids = [answer.headers["x-request-id"] for answer in (fast, slow)]
        assert ["-" in one for one in ids] == [False, True], "FastAPI's own are handled by Serve"
        wanted = {(one, 200) for one in ids}
        while not wanted <= lines_of_edge(uri, "access"):  # a line follows its answer
            assert time.monotonic() < deadline, lines_of_edge(uri, "access")
            time.sleep(0.05)
        one, two = fast.json(), slow.json()
        assert one.pop("ms").keys() == two.pop("ms").keys()
        assert one == two
