"""A cluster on this machine, of real parts: `python -m jobs.cluster up` (or `make cluster`), then `down`.

Three Ray nodes (a head, one with the resource `edge`, one with `cloud`), an S3 server (SeaweedFS) and an MLflow server
(SQLite behind it, artifacts in S3), all on loopback, with token authentication. Data and the registry stay in the
folder when it stops, and are there when it starts again.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jobs import _processes, _progress
from jobs._mlflow_server import MlflowServer
from jobs._processes import Part
from jobs._ray_nodes import Kind, Node, serve_variables
from jobs._s3_server import S3Server
from meanet.errors import UserError, exit_on_user_error
from meanet.storage import writable_directory, write_text

_START_S = 120.0
_END_S = 3.0
"""`ray start --block` ignores a SIGTERM for half a minute, and its nodes have nothing to save."""
_STOP_JOB_S = 15
"""A stopped job's time to end well, before it is killed; 3 by Ray's own."""
_ROOT = Path(__file__).parent.parent
_CPUS: dict[Kind, int] = {"head": 2, "edge": 3, "cloud": 3}
"""That nodes give out: a replica and a training worker of two on each; the head can stand in for one that is lost."""


@dataclass(frozen=True)
class Flags:
    """Start, add to, look at, or stop a cluster on this machine.

    up: three nodes and both servers, once all are healthy. add: one more node. status: what runs. down: stop it all.
    """

    action: Annotated[Literal["up", "add", "status", "down"], tyro.conf.Positional]
    """What to do."""
    kind: Annotated[Literal["edge", "cloud"] | None, tyro.conf.Positional] = None
    """Of `add`: the new node's resource."""
    folder: Path = Path("outputs/cluster")
    """Where data, registry, logs and the environment to use lie."""
    block: bool = False
    """Of `up`: stay until Ctrl-C, and stop it all then."""
    dashboard_port: int = 8265
    """Of jobs and Serve; 0 takes a free one."""
    mlflow_port: int = 5000
    """Of the MLflow server; 0 takes a free one."""
    s3_port: int = 0
    """Of the S3 server; 0 takes a free one."""
    object_store_mb: int = 200
    """Of each node: what workers share must fit, such as the pixels of a set in memory."""
    json: bool = False
    """Print what runs as JSON."""


@dataclass
class Record:
    """The content of cluster.json: what runs, for whoever is to stop it."""

    mark: str
    """In the environment of all its processes."""
    temporary: str
    """Folder of Ray's nodes, which goes with the cluster."""
    gcs: str
    """HOST:PORT."""
    urls: dict[str, str]
    """Part -> where it listens."""
    parts: list[Part] = field(default_factory=list)
    """In the order in which they were started."""
    nodes: list[Node] = field(default_factory=list)


class Cluster:
    """The cluster of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = writable_directory(folder.expanduser(), "--folder")
        self.record = self._read()

    @property
    def env_file(self) -> Path:
        """What a shell sources."""
        return self.folder / "env"

    @property
    def running(self) -> bool:
        """Whether any of it runs."""
        return self.record is not None and bool(_processes.marked(self.record.mark))

    @contextlib.contextmanager
    def alone(self, *, wait: bool = False) -> Iterator[None]:
        """While another command changes this cluster, none of ours does.

        Raises:
            UserError: one does, and is not to be waited for.
        """
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another jobs.cluster is at work in {self.folder}: wait for it to end") from error
            self.record = self._read()
            yield

    # Start

    def up(self, flags: Flags) -> None:
        """Start all of it and wait until it is healthy; what was started is stopped again if that fails.

        Raises:
            UserError: one is running; a port is taken; a part does not come up.
        """
        if self.running:
            raise UserError(
                f"a cluster is running in {self.folder}: `python -m jobs.cluster down --folder {self.folder}` stops it"
            )
        self.down()  # what a machine that was switched off has left
        ports = {
            name: _processes.chosen_port(getattr(flags, f"{name}_port"), f"--{name}-port")
            for name in ("dashboard", "mlflow", "s3")
        }
        gcs, *others = _processes.free_ports(4)
        s3 = S3Server(self.folder / "s3", ports["s3"], (others[0], others[1], others[2]), *self._key())
        mlflow = MlflowServer(self.folder / "mlflow", ports["mlflow"], "s3://mlflow/artifacts")
        temporary = Path(tempfile.mkdtemp(prefix="meanet-"))
        urls = {"dashboard": f"http://127.0.0.1:{ports['dashboard']}", "mlflow": mlflow.url, "s3": s3.url}
        self.record = Record(secrets.token_hex(8), str(temporary), f"127.0.0.1:{gcs}", urls)
        try:
            self._start_all(s3, mlflow, ports["dashboard"], flags.object_store_mb * 2**20)
        except BaseException:  # Ctrl-C among them
            self.down()
            raise

    def _start_all(self, s3: S3Server, mlflow: MlflowServer, dashboard_port: int, store_bytes: int) -> None:
        assert self.record is not None, "it was made before"
        s3.folder.mkdir(mode=0o700, exist_ok=True)
        mlflow.folder.mkdir(mode=0o700, exist_ok=True)
        client = self._client(s3, mlflow)
        s3_part = self._begin("S3 server", s3.command, s3.own_environment)
        mlflow_part = self._begin(
            "MLflow server", mlflow.command, mlflow.own_environment({**_clean(), **s3.environment})
        )
        variables = serve_variables(Path(self.record.temporary))
        self._write_env(client, {**variables, **_python(), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_JOB_S)})
        head = self._begin_node(self._node("head", "head", store_bytes, dashboard_port))
        self._wait(s3_part, s3.ready)
        self._wait(*head)
        self.add(("edge", "cloud"), store_bytes)
        self._wait(mlflow_part, mlflow.ready)

    def add(self, kinds: Iterable[Kind], store_bytes: int) -> None:
        """More nodes, once they are healthy.

        Raises:
            UserError: one does not come up.
        """
        assert self.record is not None, "it runs"
        begun = []
        for kind in kinds:
            count = sum(node.kind == kind for node in self.record.nodes)
            begun.append(self._begin_node(self._node(kind, f"{kind}-{count + 1}", store_bytes)))
        for part, ready in begun:
            self._wait(part, ready)

    def _node(self, kind: Kind, name: str, store_bytes: int, dashboard_port: int = 0) -> Node:
        assert self.record is not None, "it was made before"
        folder = str(Path(self.record.temporary) / name)
        return Node(name, kind, self.record.gcs, folder, _CPUS[kind], store_bytes, dashboard_port)

    def _begin_node(self, node: Node) -> tuple[Part, Callable[[], bool]]:
        assert self.record is not None, "it was made before"
        self.record.nodes.append(node)
        return self._begin(f"Ray node {node.name}", node.command, self._node_environment()), node.ready

    def _begin(self, name: str, command: list[str], environment: dict[str, str]) -> Part:
        assert self.record is not None, "it was made before"
        self._save()  # the mark is known before anything carries it
        log = self.folder / "logs" / f"{name.replace(' ', '-').lower()}.log"
        part = _processes.begin(name, command, environment, self.record.mark, log)
        self.record.parts.append(part)
        self._save()
        return part

    def _wait(self, part: Part, ready: Callable[[], bool]) -> None:
        assert self.record is not None, "it was made before"
        _processes.wait_until(ready, part, self.record.mark, _START_S)
        _progress.say(f"  {part.name} is healthy (pid {part.pid})")

    # Stop

    def down(self) -> None:
        """Stop every process of it, by its id; data, registry and logs stay."""
        if self.record is None:
            return
        _processes.end(reversed(self.record.parts), self.record.mark, _END_S)
        shutil.rmtree(self.record.temporary, ignore_errors=True)
        for name in ("cluster.json", "env", "nodes.json", "token"):
            (self.folder / name).unlink(missing_ok=True)
        self.record = None

    # What is written

    def _client(self, s3: S3Server, mlflow: MlflowServer) -> dict[str, str]:
        """What a client needs."""
        assert self.record is not None, "it was made before"
        token = self.folder / "token"
        _write_private(token, secrets.token_hex(32))
        return {
            "RAY_ADDRESS": self.record.gcs,
            "RAY_API_SERVER_ADDRESS": self.record.urls["dashboard"],  # ray job submit
            "RAY_DASHBOARD_ADDRESS": self.record.urls["dashboard"],  # serve deploy
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "MLFLOW_TRACKING_URI": mlflow.url,
            **s3.environment,
        }

    def _key(self) -> tuple[str, str]:
        """Of the S3 server: made once, for its data outlive it."""
        path = self.folder / "s3-key.json"
        if not path.exists():
            _write_private(path, json.dumps({"key": f"meanet-{secrets.token_hex(4)}", "secret": secrets.token_hex(20)}))
        kept = json.loads(path.read_text())
        return kept["key"], kept["secret"]

    def _write_env(self, client: dict[str, str], nodes: dict[str, str]) -> None:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in client.items()]
        _write_private(self.env_file, "\n".join(lines) + "\n")
        nodes = {name: value for name, value in client.items() if name != "RAY_ADDRESS"} | nodes
        _write_private(self.folder / "nodes.json", json.dumps(nodes))

    def _node_environment(self) -> dict[str, str]:
        return {**_clean(), **json.loads((self.folder / "nodes.json").read_text())}

    def _save(self) -> None:
        assert self.record is not None, "it was made before"
        write_text(json.dumps(asdict(self.record), indent=2), self.folder / "cluster.json")

    def _read(self) -> Record | None:
        path = self.folder / "cluster.json"
        try:
            plain = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): remove it once no process of that cluster runs"
            ) from error
        parts = [Part(**part) for part in plain["parts"]]
        nodes = [Node(**{**node, "ports": tuple(node["ports"])}) for node in plain["nodes"]]
        return Record(**{**plain, "parts": parts, "nodes": nodes})

    def view(self) -> dict[str, Any]:
        """What runs: parts with their ids, nodes with their raylets', addresses, and the file to source."""
        if self.record is None:
            return {"running": False}
        mark = self.record.mark
        parts = [
            {
                "name": part.name,
                "pid": part.pid,
                "runs": _processes.alive(part, mark),
                "raylet": _processes.raylet(part, mark),
                "log": part.log,
            }
            for part in self.record.parts
        ]
        return {"running": self.running, "parts": parts, "urls": self.record.urls, "env": str(self.env_file)}


def _clean() -> dict[str, str]:
    """This environment without what would lead to another cluster, store or bucket."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "AWS_")) and name != _processes.MARK
    }


def _python() -> dict[str, str]:
    """This checkout's code, by this Python: for nodes, whose jobs and replicas say plain `python`."""
    path = os.pathsep.join([str(_ROOT / "platform"), str(_ROOT)])
    return {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _write_private(path: Path, text: str) -> None:
    """A file that nobody else may read."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def _show(view: dict[str, Any]) -> None:
    if not view["running"]:
        print("no cluster is running")
        return
    for part in view["parts"]:
        state = "runs" if part["runs"] else "has ended"
        raylet = f", its raylet {part['raylet']}" if part["raylet"] else ""
        print(f"{part['name']:<18} {state}, pid {part['pid']}{raylet}")
    for name, url in view["urls"].items():
        print(f"{name:<18} {url}")
    print(f"\nthe environment to use (it holds credentials; only you can read it):\n    source {view['env']}")


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _until_interrupted(cluster: Cluster) -> None:
    """Stay until Ctrl-C or SIGTERM, then stop it all, once no other command is at work on it."""
    assert cluster.record is not None, "it is up"
    mark = cluster.record.mark
    _progress.say("Ctrl-C stops it")
    try:
        while cluster.running:
            time.sleep(1)
    finally:
        with cluster.alone(wait=True):
            if cluster.record is not None and cluster.record.mark == mark:  # and not one that was started since
                cluster.down()


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m jobs.cluster")  # not by _cli, which brings torch and MLflow along
    if (flags.kind is None) == (flags.action == "add"):
        raise UserError("give `add` a kind of node, edge or cloud" if flags.kind is None else f"drop {flags.kind!r}")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background commands are started with SIGINT ignored
        signal.signal(number, _interrupt)
    cluster = Cluster(flags.folder)
    if flags.action == "up":
        with cluster.alone():
            cluster.up(flags)
    elif flags.action == "add":
        with cluster.alone():
            if not cluster.running:
                raise UserError(f"no cluster is running in {cluster.folder}: start one with `up`")
            assert flags.kind is not None, "checked above"
            cluster.add([flags.kind], flags.object_store_mb * 2**20)
    elif flags.action == "down":
        with cluster.alone():
            cluster.down()
    view = cluster.view()
    if flags.json:
        print(json.dumps(view), flush=True)
    else:
        _show(view)
    if flags.block and flags.action == "up":
        _until_interrupted(cluster)


if __name__ == "__main__":
    main()
