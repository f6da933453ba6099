"""A real S3 server as a process that tests stop and start again: SeaweedFS on free ports, on the loopback only."""

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from jobs._processes import free_ports
from jobs._s3_server import S3Server as Weed


class S3Server:
    """May be stopped and started again over the same data."""

    def __init__(self, folder: Path) -> None:
        port, *others = free_ports(4)
        self.folder = folder
        self._weed = Weed(folder, port, (others[0], others[1], others[2]), "key-of-the-test", secrets.token_hex(8))
        self.key, self.secret, self.url = self._weed.key, self._weed.secret, self._weed.url
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return self._weed.environment

    def start(self) -> None:
        """Returns once it answers and has its buckets."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._weed.command, env=self._weed.own_environment, cwd=self.folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not self._weed.ready():
            assert self._process.poll() is None, "the S3 server has ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.2)

    def stop(self) -> None:
        """By its process id."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Running, and known to this process's libraries."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "data")
    server.start()
    before = dict(os.environ)
    os.environ.update(server.environment)
    boto3.DEFAULT_SESSION = None  # it keeps the credentials of the server before, and MLflow uses it
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
