"""Ray nodes on one machine: a head, and workers with a resource of their own, each on ports and in a folder of its own.

`ray stop` would end other clusters too, and is never called: each is `ray start --block`, ended by its id.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from jobs._processes import free_ports
from meanet.errors import UserError

Kind = Literal["head", "edge", "cloud"]
_CLI = (sys.executable, "-m", "ray.scripts.scripts")
_PORT_FLAGS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")


@dataclass(frozen=True)
class Node:
    """One node: how it is started and asked."""

    name: str
    kind: Kind
    gcs: str
    """HOST:PORT of the cluster."""
    folder: str
    """Its temporary folder; a short path, for sockets lie in it."""
    num_cpus: int
    """That it gives out."""
    object_store_bytes: int
    dashboard_port: int = 0
    """Of the head."""
    ports: tuple[int, ...] = field(default_factory=lambda: tuple(free_ports(len(_PORT_FLAGS))))
    """Of its agents: as `_PORT_FLAGS`."""

    @property
    def command(self) -> list[str]:
        """`ray start`, on loopback only."""
        host, _, port = self.gcs.partition(":")
        words = [*_CLI, "start", "--block", "--disable-usage-stats", "--node-ip-address", host]
        if self.kind == "head":
            words += ["--head", "--port", port, "--dashboard-host", host, "--dashboard-port", str(self.dashboard_port)]
            words += ["--ray-client-server-port", str(free_ports(1)[0])]
        else:
            words += ["--address", self.gcs, "--resources", json.dumps({self.kind: 1})]
        for flag, number in zip(_PORT_FLAGS, self.ports, strict=True):
            words += [f"--{flag}-port", str(number)]
        words += ["--num-cpus", str(self.num_cpus), "--object-store-memory", str(self.object_store_bytes)]
        return [*words, "--temp-dir", self.folder]

    def ready(self) -> bool:
        """Whether its raylet, its agent and (of the head) the dashboard answer."""
        urls = [f"http://127.0.0.1:{self.ports[0]}/api/local_raylet_healthz"]
        if self.kind == "head":
            urls.append(f"http://127.0.0.1:{self.dashboard_port}/api/gcs_healthz")
        try:
            return all(httpx.get(url, timeout=2).is_success for url in urls)
        except httpx.HTTPError:
            return False


def serve_variables(folder: Path) -> dict[str, str]:
    """Ray Serve's fast ingress on free ports (docs/serving.md): to be set on every node before it starts.

    Raises:
        UserError: they cannot be told.
    """
    words = [sys.executable, "-m", "serve_apps.ingress", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise UserError(f"Serve's ingress cannot be prepared: {done.stderr.strip()[-500:]}")
    variables: dict[str, str] = json.loads(done.stdout)
    return variables
