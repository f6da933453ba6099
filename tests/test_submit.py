"""`ray job submit` to a cluster that has an older meanet installed: the submitted code is what runs."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.cluster
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
CLUSTER = 6
"""Which of the README's shell blocks submits to a cluster."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def older_wheel(folder: Path) -> Path:
    """meanet 0.0.1, which has next to nothing."""
    path = folder / "meanet-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("meanet/__init__.py", '__version__ = "0.0.1"\n')
        wheel.writestr("meanet/cluster.py", 'raise RuntimeError("the older wheel was used")\n')
        info = "meanet-0.0.1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: meanet\nVersion: 0.0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def environment_with_older_meanet(folder: Path) -> Path:
    """A virtual environment with this one's packages, and the older wheel before them; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([str(python), "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    own = subprocess.run([sys.executable, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip()
    (site / "packages.pth").write_text(f"{own}\n")
    with zipfile.ZipFile(older_wheel(folder)) as wheel:
        wheel.extractall(site)
    seen = [str(python), "-c", "import meanet; print(meanet.__version__)"]
    plain = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    version = subprocess.run(seen, check=True, capture_output=True, text=True, env=plain, cwd=folder).stdout.strip()
    assert version == "0.0.1", "the environment must have the older wheel for this test to mean anything"
    return python


@dataclass(frozen=True)
class Head:
    python: Path
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A separately started `ray start --head`, with token authentication, on free ports."""
    folder = tmp_path_factory.mktemp("head")
    python = environment_with_older_meanet(folder)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{python.parent}{os.pathsep}{ENVIRONMENT['PATH']}",
    }
    temporary = Path(os.environ.get("TMPDIR", "/tmp")) / f"mr-{secrets.token_hex(3)}"
    port, dashboard = free_port(), free_port()
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    options = ["--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "2"]
    for name in ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "ray-client-server"):
        options += [f"--{name}-port", str(free_port())]
    options += ["--object-store-memory", str(200 * 2**20), "--temp-dir", str(temporary)]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_port(dashboard, process, folder / "head.log")
        yield Head(python, f"http://127.0.0.1:{dashboard}", environment)
    finally:
        process.send_signal(signal.SIGTERM)  # which it ignores for half a minute
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.3)
    raise AssertionError(log.read_text())


def copy_of_tree(folder: Path) -> Path:
    """What a user would submit from: the repository, from another folder than the tests'."""
    for name in ("platform", "jobs", "serve_apps", "tune_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head: Head, tree: Path, job: list[str]) -> "subprocess.CompletedProcess[str]":
    """`ray job submit`, once the head's job agent is up: it comes some seconds after the dashboard."""
    command = [str(head.python), "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [*command, "--runtime-env", "jobs/runtime_env.yaml", "--", *job],
            env=head.environment,
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def test_submitted_code_runs_and_not_the_older_wheel(head: Head, tmp_path: Path) -> None:
    tree = copy_of_tree(tmp_path / "tree")
    output = tmp_path / "run"
    flags = [f"--{phase}.epochs=2" for phase in ("main", "extension", "cloud")]
    job = ["python", "-m", "jobs.train", "digits", "--output", str(output), *flags]
    done = submit(head, tree, job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    described = json.loads((output / "model" / "model.json").read_text())
    assert described["recipe"]["main"]["epochs"] == 2
    assert len(described["hard_classes"]) == 5


def test_the_readmes_submission(head: Head, tmp_path: Path) -> None:
    words = re.search(r"ray job submit --address \S+ --runtime-env jobs/runtime_env.yaml -- (.*)", BLOCKS[CLUSTER])
    assert words is not None
    done = submit(head, copy_of_tree(tmp_path / "tree"), words[1].split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hard classes, hardest first" in done.stdout
