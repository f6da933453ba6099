"""The server with a cloud that can be told to misbehave, and the processes of such a server.

`python -m benchmarks.unreliable` takes the flags of `python -m serve_apps`. Its cloud does what `fault.json` in the
folder MEANET_FAULTS says at each call, and writes a file there whenever a replica of it has been made.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.memory import resident_of, tree

FOLDER = "MEANET_FAULTS"
Fault = Literal["none", "hung", "slow", "nan"]
"""hung: the replica's event loop sleeps; slow: answers after 2 s; nan: a confidence that is no number."""
SLOW_S = 2.0
_STEP_S = 0.05


@dataclass(frozen=True)
class Faulty:
    """A running server, and its cloud's strings."""

    url: str
    pid: int
    """Of its driver."""
    folder: Path

    def tell(self, fault: Fault) -> None:
        """From the next call on."""
        new = self.folder / "fault.new"
        new.write_text(json.dumps(fault))
        new.rename(self.folder / "fault.json")

    def replicas(self, deployment: str) -> list[int]:
        """Process ids."""
        return [pid for pid in tree(self.pid) if f"ServeReplica:meanet:{deployment}".encode() in _command(pid)]

    def kill_cloud(self) -> None:
        """SIGKILL to its replicas; Serve starts others."""
        for pid in self.replicas("cloud"):
            os.kill(pid, signal.SIGKILL)

    def newest_cloud(self) -> float:
        """When the newest replica of the cloud was made, on the monotonic clock (the machine's), s."""
        return max(float(path.read_text()) for path in self.folder.glob("made-*"))

    def held(self) -> int:
        """Bytes that the replicas and proxies of the server hold of their own."""
        names = (b"ServeReplica", b"Proxy", b"haproxy")
        return sum(resident_of(pid) for pid in tree(self.pid) if any(name in _command(pid) for name in names))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def running(folder: Path, tracking_uri: str, *words: str) -> Iterator[Faulty]:
    """The server on a free port, of the store's champion, until the block ends; its files lie in the folder."""
    ready = folder / "ready.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {FOLDER: str(folder), "MLFLOW_TRACKING_URI": tracking_uri, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = f"{root / 'platform'}{os.pathsep}{root}"
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.unreliable", "--port", "0", "--ready-file", str(ready), *words],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 180
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start: {(folder / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.1)
        found = json.loads(ready.read_text())
        yield Faulty(found["url"], found["pid"], folder)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def unreliable(cloud: Any) -> Any:
    """The cloud's deployment, of a class that misbehaves when told."""
    honest: Any = cloud.func_or_class

    class Cloud(honest):  # type: ignore[misc]
        """As told by the folder's file."""

        async def __init__(self, *arguments: Any, **named: Any) -> None:
            await super().__init__(*arguments, **named)
            self._folder = Path(os.environ[FOLDER])
            (self._folder / f"made-{os.getpid()}").write_text(str(time.monotonic()))

        def _told(self) -> str:
            with contextlib.suppress(OSError):
                return str(json.loads((self._folder / "fault.json").read_text()))
            return "none"

        async def classify(self, *arguments: Any, **named: Any) -> Any:
            """The honest answer, or what was told."""
            while self._told() == "hung":
                time.sleep(_STEP_S)
            if self._told() == "slow":
                await asyncio.sleep(SLOW_S)
            answer = await super().classify(*arguments, **named)
            if self._told() == "nan":
                answer.confidences[:] = [float("nan")] * len(answer.confidences)
            return answer

    Cloud.__name__ = Cloud.__qualname__ = honest.__name__
    return cloud.options(func_or_class=Cloud)


def main() -> None:
    """Command-line entry."""
    from serve_apps import __main__ as server
    from serve_apps import graph

    graph.Cloud = unreliable(graph.Cloud)
    server.main()


if __name__ == "__main__":
    main()
