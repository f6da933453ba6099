"""SIGKILL at random moments of a training whose checkpoints go to S3: `python -m benchmarks.kills`.

Starts a real S3 server and, before it, a proxy that slows what goes up, so that moments fall into uploads. A training
(`jobs.train`, a local Ray) is killed with all its processes at a moment that the seed draws, and started again; then
what it goes on from is compared with what lies in the bucket. Last it runs to its end. Called again with the same
folder it adds to the page docs/benchmarks/kills.md; exits 1 when a resume was wrong.
"""

import contextlib
import json
import os
import platform
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import tyro

from benchmarks.checkpoint_bucket import BUCKET, Bucket
from benchmarks.slow_proxy import SlowProxy
from jobs import _cli, _processes
from jobs._s3_server import S3Server

PREFIX = "kills"
"""Below which checkpoints lie."""
WIDTH = 512
"""Of the cloud's last stage: with SGD's momentum its checkpoint has 61 MB."""
_STARTED = re.compile(r"worker\(s\) (started|resumed).* (\d+) of \d+ epochs done")
_CLOUD_EPOCH = re.compile(r"cloud +epoch +(\d+)/")
_PATIENCE_S = 240.0


@dataclass(frozen=True)
class Flags:
    """Kill, resume, compare, and write the page."""

    folder: Path = Path("outputs/kills")
    """Where the S3 server's data and the record of all kills lie."""
    kills: int = 20
    """To add."""
    seed: int = 0
    """Of the moments."""
    window_s: float = 12.0
    """Moments are drawn from 0 to this after a training has started or resumed."""
    upload_mb_s: float = 10.0
    """What the proxy lets through, MB/s."""
    output: Path = Path("docs/benchmarks/kills.md")
    """The page."""


@dataclass(frozen=True)
class Moment:
    """When to kill, from a training's start: after so long, or once so much has gone up."""

    seconds: float = 0.0
    megabytes: float = 0.0


@dataclass(frozen=True)
class Left:
    """What a kill has left in the bucket that is no checkpoint."""

    uploads: list[str]
    """Ids of uploads in parts that are open."""
    folders: list[str]
    """Of checkpoints, without one."""


@dataclass
class Kill:
    """One of them, and what came of it."""

    moment_s: float
    """After the training had started or resumed."""
    processes: int
    """That were killed."""
    left: Left
    found: str | None
    """Folder of the newest checkpoint that lay whole in the bucket."""
    found_epochs: int
    """That it has seen."""
    megabytes: float
    """That it has."""
    registered_epochs: int
    """What Ray's own snapshot would have gone on from."""
    resumed_epochs: int = -1
    """What the next training went on from."""
    leftovers: int = -1
    """Of these uploads, and of the folders without a whole checkpoint, those that were there after the resume."""

    @property
    def in_upload(self) -> bool:
        """Whether it fell into one: what earlier kills left is gone by then."""
        return bool(self.left.uploads)

    @property
    def right(self) -> bool:
        """Whether the resume took the newest whole one, and tidied."""
        return self.resumed_epochs == self.found_epochs and self.leftovers == 0


@dataclass
class Session:
    """One training, killed again and again, that ran to its end."""

    seed: int
    date: str
    upload_mb_s: float
    commit: str = "unknown"
    kills: list[Kill] = field(default_factory=list)
    epochs: int = 0
    """Of the finished run, all phases; each once and in order, else 0."""


class Training:
    """A `jobs.train` with all that descends from it."""

    def __init__(self, folder: Path, environment: dict[str, str], epochs: int) -> None:
        self._mark, self.lines = secrets.token_hex(8), list[str]()
        self._temporary = tempfile.mkdtemp(prefix="mk-", dir="/tmp")  # Ray's sockets want a short path
        words = ["digits", "--workers", "1", "--no-parallel", "--output", str(folder / "run")]
        words += ["--storage", f"s3://{BUCKET}/{PREFIX}"]
        words += ["--model.cloud.2.width", str(WIDTH), "--json", "--cloud.epochs", str(epochs)]
        words += [word for phase in ("main", "extension") for word in (f"--{phase}.epochs", "1")]
        words += [word for phase in ("main", "extension", "cloud") for word in (f"--{phase}.max-steps", "1")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", *words],
            env=environment | {_processes.MARK: self._mark, "TMPDIR": self._temporary},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None, "it is a pipe"
        self.lines.extend(self.process.stderr)

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The first line that matches.

        Raises:
            SystemExit: it has ended, or takes too long.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if found := pattern.search(line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.kill()
        raise SystemExit(f"the training says nothing like {pattern.pattern}:\n{''.join(self.lines[-30:])}")

    def kill(self) -> int:
        """SIGKILL to its process group, and at once to all else that descends from it; returns how many there were."""
        ours = _processes.marked(self._mark)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        while left := _processes.marked(self._mark):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        return len(ours)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[tuple[S3Server, SlowProxy]]:
    """An S3 server over the folder's data, and the proxy before it."""
    folder.mkdir(parents=True, exist_ok=True)
    port, *others = _processes.free_ports(4)
    server = S3Server(folder / "s3", port, (others[0], others[1], others[2]), "benchmark", secrets.token_hex(16))
    server.folder.mkdir(exist_ok=True)
    mark = secrets.token_hex(8)
    part = _processes.begin("S3 server", server.command, server.own_environment, mark, folder / "s3.log")
    try:
        _processes.wait_until(server.ready, part, mark, 60)
        with SlowProxy(port).running() as proxy:
            yield server, proxy
    finally:
        _processes.end([part], mark, 3)


def environment_of(server: S3Server, proxy: SlowProxy, folder: Path) -> dict[str, str]:
    """Of a training: this checkout's code, the bucket by way of the proxy, an MLflow store of its own."""
    url = f"http://127.0.0.1:{proxy.port}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    root = Path(__file__).parent.parent
    return {
        **kept,
        **server.environment,
        "AWS_ENDPOINT_URL": url,
        "MLFLOW_S3_ENDPOINT_URL": url,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": "1",
    }


def session(
    folder: Path,
    moments: Sequence[Moment],
    seed: int,
    upload_mb_s: float,
    note: Callable[[Session], None] = lambda session: None,
) -> Session:
    """A new training, killed at each of these moments and resumed, and run to its end.

    Args:
        folder: for all that is written, which goes again.
        moments: when to kill.
        seed: that they were drawn with.
        upload_mb_s: MB/s that may go up.
        note: called after each resume, with what there is by then.
    """
    done = Session(seed, time.strftime("%Y-%m-%d"), upload_mb_s, _cli.commit())
    with tempfile.TemporaryDirectory(dir=_made(folder)) as inner, servers(Path(inner)) as (server, proxy):
        place, bucket = Path(inner), Bucket(server, PREFIX)
        environment, epochs = environment_of(server, proxy, place), 3 * len(moments)
        proxy.bytes_per_second = 1e6 * upload_mb_s
        for moment in moments:
            with Training(place, environment, epochs) as training:
                _resumed(training, bucket, done.kills)
                note(done)
                if not done.kills:
                    training.wait_for(_CLOUD_EPOCH)  # from here on each checkpoint is of the size that is wanted
                done.kills.append(_kill(training, proxy, bucket, moment))
        proxy.bytes_per_second = None
        with Training(place, environment, epochs) as training:
            _resumed(training, bucket, done.kills)
            note(done)
            training.process.wait(_PATIENCE_S)
        done.epochs = _finished(bucket, training, epochs)
    return done


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def _kill(training: Training, proxy: SlowProxy, bucket: Bucket, moment: Moment) -> Kill:
    started, sent = time.monotonic(), proxy.sent
    while time.monotonic() - started < moment.seconds or proxy.sent - sent < 1e6 * moment.megabytes:
        if training.process.poll() is not None or time.monotonic() - started > _PATIENCE_S:
            raise SystemExit(f"the training was not there to be killed:\n{''.join(training.lines[-30:])}")
        time.sleep(0.01)
    seconds = time.monotonic() - started
    processes = training.kill()
    name, history, megabytes = bucket.newest()
    left = Left(sorted(bucket.uploads()), sorted(bucket.empty()))
    return Kill(seconds, processes, left, name, len(history), megabytes, bucket.registered())


def _resumed(training: Training, bucket: Bucket, kills: Sequence[Kill]) -> None:
    """Note at the last kill what the training went on from."""
    found = training.wait_for(_STARTED)
    if kills:
        kills[-1].resumed_epochs = int(found[2]) if found[1] == "resumed" else 0
        left = kills[-1].left
        kills[-1].leftovers = len(bucket.uploads() & set(left.uploads)) + len(bucket.empty() & set(left.folders))


def _finished(bucket: Bucket, training: Training, cloud_epochs: int) -> int:
    """Epochs of the finished run, if it ended well and each is there once and in order."""
    _, history, _ = bucket.newest()
    wanted = [("main", 1), ("extension", 1), *(("cloud", epoch + 1) for epoch in range(cloud_epochs))]
    right = training.process.returncode == 0 and [(row["phase"], row["epoch"]) for row in history] == wanted
    return len(history) if right else 0


_PAGE = """# SIGKILL while a training uploads

`python -m benchmarks.kills --window-s {window:g}`, at commit {commits}, {dates}, {cores} cores ({machine}),
Python {python}, Ray {ray}, pyarrow {pyarrow}; SeaweedFS as the S3 server.

`jobs.train digits --model.cloud.2.width {width}`, one step an epoch, a checkpoint of {least:.0f} MB or more after each,
to s3:// by way of a proxy that lets {rate} MB/s through. Driver, Ray's own processes and worker are killed together, at
a moment that is drawn evenly from 0 to {window:g} s after the training has started or resumed; then the same command is
run again. In an upload: one in parts was open in the bucket afterwards. Found: epochs of the newest checkpoint in the
bucket that can be read to its end. Registered: what Ray's own snapshot names, which may be one epoch older. Left over:
open uploads and empty folders of that kill that were still there once the training had resumed.

{kills} kills, {inside} of them inside an upload: {right} of {kills} resumes took the newest whole checkpoint and left
nothing over. {ends}

| kill | at, s | processes | in an upload | found, epochs | MB | registered | resumed from | left over |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def page(sessions: Sequence[Session], window_s: float) -> str:
    """As Markdown."""
    kills = [kill for one in sessions for kill in one.kills]
    rows = [
        f"| {number} | {kill.moment_s:.2f} | {kill.processes} | {'yes' if kill.in_upload else 'no'} "
        f"| {kill.found_epochs} | {kill.megabytes:.1f} | {kill.registered_epochs} | {_marked(kill)} "
        f"| {kill.leftovers} |"
        for number, kill in enumerate(kills, 1)
    ]
    ends = [
        f"Seed {one.seed}, {len(one.kills)} kills: "
        + (f"ended with each of its {one.epochs} epochs once." if one.epochs else "**did not end well**.")
        for one in sessions
    ]
    return _PAGE.format(
        commits=", ".join(dict.fromkeys(one.commit for one in sessions)),
        dates=", ".join(dict.fromkeys(one.date for one in sessions)),
        cores=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        ray=version("ray"),
        pyarrow=version("pyarrow"),
        width=WIDTH,
        least=min(kill.megabytes for kill in kills),
        rate=" or ".join(dict.fromkeys(f"{one.upload_mb_s:g}" for one in sessions)),
        window=window_s,
        kills=len(kills),
        inside=sum(kill.in_upload for kill in kills),
        right=sum(kill.right for kill in kills),
        ends=" ".join(ends),
        rows="\n".join(rows),
    )


def _marked(kill: Kill) -> str:
    return str(kill.resumed_epochs) if kill.right else f"**{kill.resumed_epochs}**"


def _read(path: Path) -> list[Session]:
    plain = json.loads(path.read_text()) if path.exists() else []
    kills = [[Kill(**{**kill, "left": Left(**kill["left"])}) for kill in one["kills"]] for one in plain]
    return [Session(**{**one, "kills": mine}) for one, mine in zip(plain, kills, strict=True)]


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.kills")
    record, generator = flags.folder / "kills.json", random.Random(flags.seed)  # noqa: S311
    moments = [Moment(seconds=generator.uniform(0, flags.window_s)) for _ in range(flags.kills)]
    earlier = _read(record)

    def note(so_far: Session) -> None:
        record.write_text(json.dumps([asdict(one) for one in (*earlier, so_far)], indent=1))
        for kill in so_far.kills[-1:]:
            print(f"kill {len(so_far.kills)}: {kill}", file=sys.stderr, flush=True)

    sessions = [*earlier, session(flags.folder, moments, flags.seed, flags.upload_mb_s, note)]
    note(sessions[-1])
    text = page(sessions, flags.window_s)
    flags.output.write_text(text)
    print(text)
    wrong = [kill for one in sessions for kill in one.kills if not kill.right]
    sys.exit(1 if wrong or not all(one.epochs for one in sessions) else 0)


if __name__ == "__main__":
    main()
