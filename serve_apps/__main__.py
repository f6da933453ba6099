"""Serve the champion until Ctrl-C: `python -m serve_apps` (or `make serve`).

Runs on the cluster in RAY_ADDRESS, or on a local one of its own.
"""

import contextlib
import errno
import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import tyro
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from meanet import engines
from meanet.cluster import ray_cluster
from meanet.errors import UserError, exit_on_user_error
from meanet.stopping import leave_after
from meanet.storage import write_text
from meanet.tracking import Tracker, store_uri
from serve_apps import ingress
from serve_apps.control import FOLLOW_S
from serve_apps.graph import AppArgs, app
from serve_apps.placement import most, replicas_of
from serve_apps.writes import Writes

NAME = "meanet"
REQUEST_TIMEOUT_S = 60.0
"""No request is worth more: the edge's own deadline is a few seconds, and a batch of the largest size takes some."""


@dataclass(frozen=True)
class Flags:
    """Serve a registered model over HTTP until Ctrl-C."""

    version: str = "champion"
    """Version number of the registered model, or an alias, which is followed."""
    follow_s: float = FOLLOW_S
    """How often MLflow is asked where the alias points, s; 0 = never."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    edge_replicas: str = "1"
    """Replicas of the edge's blocks; a range such as 1-4 follows the load."""
    cloud_replicas: str = "1"
    """Replicas of the cloud's network, likewise."""
    engine: engines.Name = "auto"
    """What runs the networks; auto takes onnx if it was exported at registration, else torch, and never onnx_int8."""
    ingress: Literal["haproxy", "default"] = "haproxy"
    """Of a local cluster: HAProxy, or Ray Serve's own proxy, which costs several times as much a request."""
    open_writes: bool = False
    """On a loopback host, let anybody change policy, settings and version; else the token in MEANET_TOKEN is wanted."""
    access_log: bool = False
    """A line in an edge replica's log for each request."""
    ready_file: Path | None = None
    """Where to write {"url", "pid"} once requests are answered."""


def free_port(host: str, port: int) -> int:
    """The port if it is free, or any free one for 0.

    Raises:
        UserError: it is in use, or the host is not this machine's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:  # taken; no such host or port
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "is in use" if taken else f"cannot be used ({error})"
            raise UserError(f"{host}:{port} {why}: choose another with --port, or 0 for a free one") from error
        return int(probe.getsockname()[1])


def http_options(flags: Flags) -> HTTPOptions:
    """Where to listen."""
    port = free_port(flags.host, flags.port)
    return HTTPOptions(host=flags.host, port=port, request_timeout_s=REQUEST_TIMEOUT_S)


@contextlib.contextmanager
def deployed(flags: Flags, args: AppArgs) -> Iterator[str]:
    """The application while the block runs, once it answers; yields its URL.

    On a cluster where Serve runs already, its address stays as it is and its other applications are left alone.

    Raises:
        UserError: the cluster serves an application of this name, which somebody else has started.
    """
    running = _get_global_client(raise_if_no_controller_running=False)
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    if running and NAME in serve.status().applications:
        raise UserError(
            f"this cluster serves {NAME!r} already: end that (Ctrl-C where it runs, `serve shutdown` if it was "
            "killed), or use another cluster (RAY_ADDRESS)"
        )
    options = running.http_config if running else http_options(flags)
    if not running:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=logging_config)
    try:
        serve.run(app(args), name=NAME, route_prefix="/", logging_config=logging_config)
        yield f"http://{options.host}:{options.port}"
    finally:
        if running:
            serve.delete(NAME)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _stop_signal(ready: threading.Event) -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; to be called after Ray, which installs handlers of its own.

    Before the server is `ready`, they interrupt whatever it waits for.
    """
    stop = threading.Event()

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        if not ready.is_set():
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


@contextlib.contextmanager
def ingress_of(flags: Flags) -> Iterator[None]:
    """What a local cluster's environment needs for the ingress asked for; says so where it cannot be had."""
    if os.environ.get("RAY_ADDRESS") or flags.ingress == "default":
        yield
        return
    with ingress.prepared() as reason:
        if reason is not None:
            print(f"HAProxy is not used ({reason}): Ray Serve's own proxy costs several times as much", file=sys.stderr)
        yield


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m serve_apps")
    tracking_uri = store_uri(os.environ.get("MLFLOW_TRACKING_URI"))
    if not os.environ.get("RAY_ADDRESS"):
        free_port(flags.host, flags.port)  # before a cluster starts; a running one may serve at an address of its own
    if not 0 <= flags.follow_s < math.inf:
        raise UserError(f"--follow-s is {flags.follow_s:g}: it must be a number of seconds, or 0 for never")
    edge_replicas = replicas_of(flags.edge_replicas, "--edge-replicas")
    cloud_replicas = replicas_of(flags.cloud_replicas, "--cloud-replicas")
    Writes.read(os.environ, open_writes=flags.open_writes, host=flags.host)  # before a cluster starts
    version = Tracker(tracking_uri).version_of(flags.version)  # before a cluster starts: it may not exist
    args = AppArgs(
        tracking_uri=tracking_uri,
        version=flags.version,
        follow_s=flags.follow_s,
        edge_replicas=edge_replicas,
        cloud_replicas=cloud_replicas,
        open_writes=flags.open_writes,
        engine=flags.engine,
        access_log=flags.access_log,
    )
    replicas = most(edge_replicas) + most(cloud_replicas)
    cpus = max(2, os.cpu_count() or 1, replicas)  # a machine of one's own may have more replicas than cores
    with ingress_of(flags), ray_cluster(os.environ.get("RAY_ADDRESS") or None, num_cpus=cpus):
        ready = threading.Event()
        stop = _stop_signal(ready)
        with deployed(flags, args) as url:
            ready.set()
            if flags.ready_file:
                write_text(json.dumps({"url": url, "pid": os.getpid()}), flags.ready_file)
            print(f"serving {NAME} version {version} at {url}  (docs: {url}/docs; Ctrl-C stops)", flush=True)
            stop.wait()


if __name__ == "__main__":
    leave_after(main)
