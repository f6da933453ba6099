"""S3 and MLflow go away in the middle of a training: `python -m benchmarks.storage_outage`.

`jobs.train` with its checkpoints in a bucket and its metrics at a server; both are killed after its third epoch and
come back some time later. Writes docs/benchmarks/storage_outage.md; exits 1 when anything was lost.
"""

import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from benchmarks.checkpoint_bucket import BUCKET, Bucket
from jobs import _cli, _processes
from jobs._mlflow_server import MlflowServer
from jobs._processes import Part
from jobs._s3_server import S3Server

PHASES = ("main", "extension", "cloud")
EPOCHS = 10
"""Of each phase."""
_FIRST = re.compile(r"main +epoch +3/")
_START_S = 240.0
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Flags:
    """Train through both outages and write the page."""

    s3_s: float = 20.0
    """How long S3 is away."""
    mlflow_s: float = 60.0
    """How long MLflow is away, from the same moment on."""
    output: Path = Path("docs/benchmarks/storage_outage.md")
    """The page."""


@dataclass(frozen=True)
class Outcome:
    """What came of the training."""

    returncode: int
    said: str
    """On standard error."""
    seconds: float
    """In all."""
    away: dict[str, float]
    """Server -> seconds from its kill until it answered again."""
    steps: dict[str, list[int]]
    """Phase -> steps at which MLflow has a loss, in order."""
    statuses: dict[str, str]
    """Phase -> status of its run."""
    artifacts: int
    """Of the run, in the bucket."""
    history: list[tuple[str, int]]
    """(phase, epoch) in the last checkpoint."""

    @property
    def starts(self) -> int:
        """How often the workers were started or resumed."""
        return self.said.count("worker(s) ")

    @property
    def right(self) -> bool:
        """Whether it ended well, in one go, and nothing is missing."""
        wanted = list(range(1, EPOCHS + 1))
        whole = [(phase, epoch) for phase in PHASES for epoch in wanted]
        return (
            (self.returncode, self.starts) == (0, 1)
            and self.steps == dict.fromkeys(PHASES, wanted)
            and set(self.statuses.values()) == {"FINISHED"}
            and self.artifacts > 0
            and self.history == whole
        )


class Server:
    """A server that is killed and started again over the same data."""

    def __init__(self, name: str, begin: Callable[[], Part], ready: Callable[[], bool], mark: str) -> None:
        self._name, self._begin, self._ready, self._mark = name, begin, ready, mark
        self.part = begin()

    def wait(self) -> None:
        """Until it answers.

        Raises:
            UserError: it does not.
        """
        _processes.wait_until(self._ready, self.part, self._mark, _START_S)

    def away(self, seconds: float, noted: dict[str, float]) -> threading.Thread:
        """Kill its session, and start it again so long after; how long it was away is noted by its name."""
        os.killpg(self.part.pid, signal.SIGKILL)
        killed = time.monotonic()

        def back() -> None:
            time.sleep(seconds)
            self.part = self._begin()
            self.wait()
            noted[self._name] = time.monotonic() - killed

        thread = threading.Thread(target=back)
        thread.start()
        return thread


def measure(folder: Path, s3_s: float, mlflow_s: float) -> Outcome:
    """One training through both outages.

    Args:
        folder: for all that is written.
        s3_s: how long S3 is away.
        mlflow_s: how long MLflow is.
    """
    port, mlflow_port, *others = _processes.free_ports(5)
    bucket = S3Server(folder / "s3", port, (others[0], others[1], others[2]), "benchmark", secrets.token_hex(16))
    tracking = MlflowServer(folder / "mlflow", mlflow_port, "s3://mlflow/artifacts")
    marks = [secrets.token_hex(8), secrets.token_hex(8)]
    for place in (bucket.folder, tracking.folder):
        place.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    path = f"{_ROOT / 'platform'}{os.pathsep}{_ROOT}"
    environment = {**kept, **bucket.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    own = tracking.own_environment(environment)
    log = folder / "servers.log"
    servers: list[Server] = []
    try:
        servers += [
            Server("S3", lambda: _begin(bucket.command, bucket.own_environment, marks[0], log), bucket.ready, marks[0])
        ]
        servers[0].wait()
        servers += [Server("MLflow", lambda: _begin(tracking.command, own, marks[1], log), tracking.ready, marks[1])]
        servers[1].wait()
        return _train(folder, environment | {"MLFLOW_TRACKING_URI": tracking.url}, bucket, servers, (s3_s, mlflow_s))
    finally:
        for server, mark in zip(servers, marks, strict=False):
            _processes.end([server.part], mark, 3)


def _begin(command: list[str], environment: dict[str, str], mark: str, log: Path) -> Part:
    return _processes.begin("server", command, environment, mark, log)


def _train(
    folder: Path, environment: dict[str, str], bucket: S3Server, servers: Iterable[Server], away_s: tuple[float, float]
) -> Outcome:
    words = [
        sys.executable,
        "-m",
        "jobs.train",
        "digits",
        "--workers",
        "1",
        "--no-parallel",
        "--output",
        str(folder / "run"),
    ]
    words += ["--storage", f"s3://{BUCKET}/checkpoints", "--json"]
    words += [word for name in PHASES for word in (f"--{name}.epochs", str(EPOCHS))]
    lines, threads, noted, started = list[str](), list[threading.Thread](), dict[str, float](), time.monotonic()
    process = subprocess.Popen(
        words, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None, "it is a pipe"
        for line in process.stderr:
            lines.append(line)
            if not threads and _FIRST.search(line):
                threads += [server.away(seconds, noted) for server, seconds in zip(servers, away_s, strict=True)]
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - started
    if process.returncode:
        return Outcome(process.returncode, "".join(lines), seconds, noted, {}, {}, 0, [])
    logged = _logged(environment["MLFLOW_TRACKING_URI"], json.loads(printed)["mlflow_run"])
    history = Bucket(bucket, "checkpoints").newest()[1]
    return Outcome(0, "".join(lines), seconds, noted, *logged, [(row["phase"], row["epoch"]) for row in history])


def _logged(uri: str, run: str) -> tuple[dict[str, list[int]], dict[str, str], int]:
    """Steps and status of each phase's run, and the number of artifacts."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(run).info.experiment_id
    phases = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    steps = {
        phase.data.tags["phase"]: sorted(
            {metric.step for metric in client.get_metric_history(phase.info.run_id, "loss")}
        )
        for phase in phases
    }
    statuses = {phase.data.tags["phase"]: phase.info.status for phase in phases}
    return steps, statuses, len(client.list_artifacts(run))


_PAGE = """# S3 and MLflow away in the middle of a training

`python -m benchmarks.storage_outage --s3-s {s3:g} --mlflow-s {mlflow:g}`, at commit {commit}, {date}, {cores} cores
({machine}), Python {python}, Ray {ray}, MLflow {mlflow_version}; SeaweedFS as the S3 server.

`jobs.train digits`, three phases of {epochs} epochs, a checkpoint after each to s3://, metrics to an MLflow server
whose artifacts lie in the same S3 server. After the third epoch both are killed (SIGKILL), and started again {s3:g} s
and {mlflow:g} s later.

| | |
| --- | --- |
| exit status | {returncode} |
| seconds in all | {seconds:.0f} |
| S3 away, s | {s3_away:.1f} |
| MLflow away, s | {mlflow_away:.1f} |
| workers were started, times | {starts} |
| points that MLflow has, of {wanted} | {points} |
| phases' runs that are finished | {finished} of 3 |
| epochs in the last checkpoint, of {wanted} | {history} |
| **nothing lost** | {right} |
"""


def page(flags: Flags, outcome: Outcome) -> str:
    """As Markdown."""
    return _PAGE.format(
        s3=flags.s3_s,
        mlflow=flags.mlflow_s,
        commit=_cli.commit(),
        date=time.strftime("%Y-%m-%d"),
        cores=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        ray=version("ray"),
        mlflow_version=version("mlflow"),
        epochs=EPOCHS,
        returncode=outcome.returncode,
        seconds=outcome.seconds,
        s3_away=outcome.away.get("S3", float("nan")),
        mlflow_away=outcome.away.get("MLflow", float("nan")),
        starts=outcome.starts,
        wanted=len(PHASES) * EPOCHS,
        points=sum(map(len, outcome.steps.values())),
        finished=sum(status == "FINISHED" for status in outcome.statuses.values()),
        history=len(outcome.history),
        right="yes" if outcome.right else "**no**",
    )


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.storage_outage")
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(Path(folder), flags.s3_s, flags.mlflow_s)
    text = page(flags, outcome)
    flags.output.write_text(text)
    print(text if outcome.right else f"{text}\n{outcome.said}")
    sys.exit(0 if outcome.right else 1)


if __name__ == "__main__":
    main()
