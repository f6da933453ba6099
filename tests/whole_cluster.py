"""What `make cluster` starts, as tests use it: its environment, nodes and processes; load, and logs."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from conftest import ENVIRONMENT, ROOT
from test_submit import copy_of_tree

from jobs import _processes


def python(
    *words: str, environment: dict[str, str], cwd: Path, timeout: int = 400
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout
    )


@dataclass(frozen=True)
class Here:
    """The cluster of `make cluster`, and where its user stands."""

    folder: Path
    environment: dict[str, str]
    """After sourcing what it printed, from a shell with nothing else set."""
    elsewhere: Path
    """Another copy of the repository, from which jobs are submitted."""

    def view(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return python("-m", "jobs.cluster", *words, "--folder", str(self.folder), environment=ENVIRONMENT, cwd=ROOT)

    def raylet(self, name: str) -> int:
        (found,) = [part["raylet"] for part in self.view()["parts"] if part["name"] == f"Ray node {name}"]
        assert found, f"{name} has a raylet"
        return int(found)

    def nodes(self) -> dict[str, str]:
        """Ray's ids of the nodes that are alive, by their own resource; asked of Ray in a process of its own."""
        code = (
            "import json, ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
            "print(json.dumps({kind: n['NodeID'] for n in ray.nodes() if n['Alive'] "
            "for kind in ('edge', 'cloud') if kind in n['Resources']}))"
        )
        done = python("-c", code, environment=self.environment, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found


def sourced(env: Path) -> dict[str, str]:
    """A shell's environment after sourcing the file."""
    shell = subprocess.run(
        ["bash", "-c", f"set -eu; source {env}; env -0"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """`make cluster ARGS='up --block'`, ended by Ctrl-C."""
    folder = tmp_path_factory.mktemp("cluster")
    words = ["up", "--block", "--json", "--folder", str(folder), "--dashboard-port", "0", "--mlflow-port", "0"]
    with (
        (folder / "up.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "jobs.cluster", *words],
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, (folder / "up.log").read_text()
        record = json.loads((folder / "cluster.json").read_text())
        elsewhere = copy_of_tree(tmp_path_factory.mktemp("elsewhere") / "tree")
        found = Here(folder, sourced(Path(json.loads(first)["env"])), elsewhere)
        try:
            yield found
            assert_no_secrets(found, record)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            left = _processes.marked(record["mark"])
            found.command("down")
        assert (process.returncode, left) == (130, []), "Ctrl-C ends all of it"
    assert not Path(record["temporary"]).exists()
    assert not {"env", "token", "cluster.json"} & {path.name for path in folder.iterdir()}


def assert_no_secrets(here: Here, record: dict[str, Any]) -> None:
    """Neither Ray's token nor the bucket's secret stands in a log or in a table of the MLflow server's."""
    secrets = [Path(here.environment["RAY_AUTH_TOKEN_PATH"]).read_text(), here.environment["AWS_SECRET_ACCESS_KEY"]]
    logs = [*(here.folder / "logs").iterdir(), *(here.folder / "mlflow").iterdir()]
    logs += Path(record["temporary"]).rglob("session_2*/logs/**/*")
    read = 0
    for path in logs:
        if path.is_file():
            read += 1
            data = path.read_bytes()
            assert not any(secret.encode() in data for secret in secrets), path
    assert read > 30, "there are logs"


def keys(here: Here, bucket: str) -> list[str]:
    """Of a bucket's objects."""
    client = boto3.client(
        "s3",
        endpoint_url=here.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=here.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=here.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [one["Key"] for page in pages for one in page.get("Contents", [])]


def training_raylets(mark: str) -> set[int]:
    """Of the nodes that hold training workers: their processes' parents."""
    found = set()
    for pid in _processes.marked(mark):
        try:
            if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            continue
    return found


class Load(threading.Thread):
    """Asks the server without a pause between answers and the next request, until it is told to stop."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        super().__init__(name="load", daemon=True)
        self._url, self._bodies = url, bodies
        self._over = threading.Event()
        self.statuses: Counter[int | str] = Counter()
        self.answers: list[dict[str, Any]] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._over.wait(0.05):
                body = self._bodies[len(self.answers) % len(self._bodies)]
                try:
                    response = client.post("/v1/classify", content=body, headers={"content-type": "image/png"})
                except httpx.HTTPError as error:
                    self.statuses[repr(error)] += 1
                    continue
                self.statuses[response.status_code] += 1
                self.answers.append(response.json())

    def until(self, wanted: Callable[[dict[str, Any]], bool], patience_s: float = 150) -> dict[str, Any]:
        """The first of the answers from now on that is as wanted."""
        seen, deadline = len(self.answers), time.monotonic() + patience_s
        while time.monotonic() < deadline:
            for answer in self.answers[seen:]:
                seen += 1
                if wanted(answer):
                    return answer
            time.sleep(0.05)
        raise AssertionError(f"no such answer; {self.statuses}, the last one {self.answers[-1:]}")

    def stop(self) -> None:
        self._over.set()
        self.join()
