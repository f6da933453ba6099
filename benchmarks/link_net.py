"""Two network namespaces on a bridge of this machine, and a shaper on what leaves the first: an edge and its uplink.

    root 10.213.N.1 -- bridge -+- edge  10.213.N.2   (token bucket on its way out)
                               +- cloud 10.213.N.3

Needs root and iproute2. Everything carries a name of its own, and is removed by it.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BURST_BYTES = 15_000
"""Of the token bucket: what may go out faster than the rate."""
_QUEUE = "400ms"
"""What waits longer is dropped."""


def why_not() -> str | None:
    """Why this machine does not let us; None = it does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"there is no {missing[0]}: install iproute2"
    try:
        with shaped_link() as link:
            link.shape(1.0)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` is not allowed here: {error.stderr.strip()}"
    return None


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Link:
    """While it is there."""

    name: str
    """What all its parts' names begin with."""
    net: str
    """First three numbers of its addresses."""

    @property
    def root(self) -> str:
        """Address of this machine itself."""
        return f"{self.net}.1"

    @property
    def edge(self) -> str:
        """Address of the edge."""
        return f"{self.net}.2"

    @property
    def cloud(self) -> str:
        """Address of the cloud."""
        return f"{self.net}.3"

    def inside(self, place: str) -> list[str]:
        """Words before a command that is to run in the namespace `edge` or `cloud`."""
        return ["ip", "netns", "exec", f"{self.name}-{place}"]

    def shape(self, mbps: float) -> None:
        """From now on the edge sends at this rate, Mbit/s, headers included."""
        bucket = ["tbf", "rate", f"{mbps}mbit", "burst", str(BURST_BYTES), "latency", _QUEUE]
        _run(*self.inside("edge"), "tc", "qdisc", "replace", "dev", "eth0", "root", *bucket)

    def up(self) -> None:
        """Make it.

        Raises:
            subprocess.CalledProcessError: it is not allowed, or another holds the addresses.
        """
        bridge = f"{self.name}-br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.root}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for place, address in (("edge", self.edge), ("cloud", self.cloud)):
            space, ours = f"{self.name}-{place}", f"{self.name}-{place[0]}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", ours, "master", bridge, "up")
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def down(self) -> None:
        """Remove what there is of it; its wires go with the namespaces."""
        for words in (
            ("netns", "del", f"{self.name}-edge"),
            ("netns", "del", f"{self.name}-cloud"),
            ("link", "del", f"{self.name}-br"),
        ):
            subprocess.run(["ip", *words], check=False, capture_output=True)  # noqa: S607

    def bare_tcp(self, num_bytes: int) -> float:
        """Seconds for so many bytes from edge to cloud and one back, over a TCP connection that is there already."""
        words: Sequence[str] = [sys.executable, "-c"]
        server = subprocess.Popen(
            [*self.inside("cloud"), *words, _SERVER, self.cloud, str(num_bytes)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None, "it is a pipe"
            port = server.stdout.readline().strip()
            done = subprocess.run(
                [*self.inside("edge"), *words, _CLIENT, self.cloud, port, str(num_bytes)],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
        finally:
            server.kill()
            server.communicate()
        return float(done.stdout)


_SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
client, _ = listener.accept()
left = int(sys.argv[2])
while left > 0:
    left -= len(client.recv(65536))
client.sendall(b"x")
client.recv(1)
"""
_CLIENT = """
import socket, sys, time
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))
started = time.monotonic()
server.sendall(bytes(int(sys.argv[3])))
server.recv(1)
print(time.monotonic() - started)
"""


@contextlib.contextmanager
def shaped_link() -> Iterator[Link]:
    """The namespaces while the block runs; what runs in them must have ended by then.

    Raises:
        subprocess.CalledProcessError: they are not allowed.
    """
    link = Link(f"mnl-{secrets.token_hex(2)}", f"10.213.{1 + secrets.randbelow(250)}")
    try:
        link.up()
        yield link
    finally:
        link.down()
