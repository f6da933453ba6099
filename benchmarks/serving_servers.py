"""The servers of `benchmarks.serving`: how each is started and ended, asked by wrk, and what CPU it takes."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
MARK = "MEANET_BENCHMARK_MARK"
PEERS = ("FastAPI + uvicorn", "LitServe", "BentoML", "Ray Serve, default proxy")
OURS = "ours"
_REST_S = 0.5
"""Before a load: wrk leaves what it has asked for unanswered at its end, which is then still in a server's hands."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Where:
    """What the servers share."""

    onnx: Path
    """The networks as ONNX files, and `served.json`."""
    store: str
    """MLflow store with the champion."""
    peers: Path
    """The peers' virtual environment."""
    engine: str
    """Of ours."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    """Of one image."""
    mark: str
    """In the environment of its processes."""

    def cpu(self) -> float:
        """CPU seconds that its processes have taken so far."""
        return sum(cpu_seconds(pid) for pid in marked(self.mark))


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has taken so far; 0 if it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / _TICKS
    return 0.0


def marked(mark: str) -> list[int]:
    """Processes that inherited a mark, however they were started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(name: str, where: Where, bodies: list[bytes], *, cloud: bool) -> Iterator[Running]:
    """A server of that name while the block runs; with `cloud`, one that may ask its cloud."""
    mark, port, cloud_port = uuid.uuid4().hex, free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {MARK: mark, "SERVED_FOLDER": str(where.onnx), "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "platform"), str(ROOT)))}
    if cloud:
        environment |= {"CLOUD_ADDRESS": f"127.0.0.1:{cloud_port}"}
    commands, path = _commands(name, where, port, cloud_port, cloud=cloud)
    environment |= {"MLFLOW_TRACKING_URI": where.store}
    with tempfile.TemporaryDirectory(prefix="meanet-serving-") as folder, (Path(folder) / "log").open("w") as log:
        processes = [
            subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            for words in commands
        ]
        try:
            running = Running(f"http://127.0.0.1:{port}{path}", mark)
            if len(processes) == 2:  # the edge asks the cloud from its first image on
                _listening(cloud_port)
            _wait(running.url, bodies[0], processes, Path(folder) / "log")
            yield running
        finally:
            _end(processes, mark)


def _commands(name: str, where: Where, port: int, cloud_port: int, *, cloud: bool) -> tuple[list[list[str]], str]:
    """What to start, and the path that classifies one image."""
    ours, peers = sys.executable, str(where.peers / "bin" / "python")
    roles = [("cloud", cloud_port), ("edge", port)] if cloud else [("edge", port)]
    if name == OURS:
        path = "/v1/classify" if cloud else "/v1/classify?edge_only=true"
        return [[ours, "-m", "serve_apps", "--port", str(port), *_engine(where.engine)]], path
    if name == "Ray Serve, default proxy":
        words = [ours, "-m", "benchmarks.serving_peers.serve_app", str(port), "cloud" if cloud else "edge"]
        return [words], "/"
    if name == "LitServe":
        return [
            [peers, "-m", "benchmarks.serving_peers.litserve_app", role, str(at)] for role, at in roles
        ], "/classify"
    if name == "BentoML":
        service = "benchmarks.serving_peers.bento_app:{}Service"
        start = [peers, "-m", "bentoml", "serve", "--host", "127.0.0.1"]
        return [[*start, "--port", str(at), service.format(role.title())] for role, at in roles], "/classify"
    factory = "benchmarks.serving_peers.fastapi_app:make_{}"
    start = [peers, "-m", "uvicorn", "--host", "127.0.0.1", "--no-access-log", "--log-level", "warning", "--factory"]
    return [[*start, "--port", str(at), factory.format(role)] for role, at in roles], "/classify"


def _engine(engine: str) -> list[str]:
    return ["--engine", engine] if engine else []


def post(url: str, body: bytes, kind: str = "image/png") -> bytes:
    """The answer's body."""
    request = urllib.request.Request(url, body, {"content-type": kind}, method="POST")  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        content: bytes = response.read()
        return content


def _wait(url: str, body: bytes, processes: list["subprocess.Popen[bytes]"], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            post(url, body)
            return
        except (urllib.error.URLError, OSError) as error:
            ended = any(process.poll() is not None for process in processes)
            if ended or time.monotonic() > deadline:
                raise SystemExit(f"{url} does not answer ({error}):\n{log.read_text()[-4000:]}") from error
            time.sleep(0.2)


def _listening(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)


def _end(processes: list["subprocess.Popen[bytes]"], mark: str) -> None:
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    deadline = time.monotonic() + 5
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:  # all of them are ours: they carry the mark
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()


@dataclass(frozen=True)
class Load:
    """What a load of some seconds brought."""

    per_second: float
    """Images answered."""
    cpu_ms: float
    """Of the server's processes, an image."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Posted:
    """What wrk posts."""

    url: str
    bodies: Path
    """A packed file."""
    kind: str = "image/png"
    """Content type."""


@dataclass(frozen=True)
class Uploads:
    """What is posted whole."""

    url: str
    kind: str
    """Content type."""
    bodies: Sequence[bytes]
    images: int
    """In each body."""


def load(running: Running, what: Posted, connections: int, seconds: float) -> Load:
    """Let wrk post the bodies.

    Raises:
        SystemExit: a request failed.
    """
    script = str(ROOT / "benchmarks" / "serving_peers" / "post.lua")
    words = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        script,
        what.url,
    ]
    time.sleep(_REST_S)
    before = running.cpu()
    done = subprocess.run([*words, "--", str(what.bodies), what.kind], capture_output=True, text=True, check=True)
    spent = running.cpu() - before
    found = json.loads(done.stdout.splitlines()[-1])
    if found["failed"] or found["refused"] or not found["requests"]:
        raise SystemExit(f"{what.url} at {connections} connections: {found}")
    count = found["requests"]
    return Load(count / found["seconds"], 1000 * spent / count, found["p50_ms"], found["p99_ms"])


def uploaded(running: Running, what: Uploads, seconds: float) -> Load:
    """Post bodies one after the other, for at least so long.

    Only whole uploads are in it: wrk would leave the last one out of its count, and its CPU in.

    Raises:
        SystemExit: a request failed.
    """
    parts, took = urlsplit(what.url), list[float]()
    target, headers = f"{parts.path}?{parts.query}", {"content-type": what.kind}
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    time.sleep(_REST_S)
    before, began = running.cpu(), time.monotonic()
    while (sent := time.monotonic()) < began + seconds:
        connection.request("POST", target, what.bodies[len(took) % len(what.bodies)], headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{what.url}: {response.status} {response.read(400)!r}")
        response.read()
        took.append(time.monotonic() - sent)
    count = what.images * len(took)
    per_second, spent = count / (sent - began), running.cpu() - before
    connection.close()
    return Load(per_second, 1000 * spent / count, 1000 * median(took), 1000 * sorted(took)[int(0.99 * len(took))])


def bare(where: Where, bodies: Path, seconds: float, batch: int, *, cloud: bool) -> Load:
    """The loop over predict, in batches of so many images."""
    environment = {**os.environ, "SERVED_FOLDER": str(where.onnx), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(where.peers / "bin" / "python"), "-m", "benchmarks.serving_peers.bare", str(bodies), f"{seconds:g}"]
    words += [str(batch), *(["cloud"] if cloud else [])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    each = 1000 * found["seconds"] / found["images"]
    return Load(found["images"] / found["seconds"], 1000 * found["cpu"] / found["images"], batch * each, batch * each)
