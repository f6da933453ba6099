"""A real MLflow server, SQLite behind it, artifacts through it: for `jobs.cluster`, and for tests."""

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class MlflowServer:
    """How it is started and asked; its database lies in the folder."""

    folder: Path
    port: int
    artifacts: str
    """Where artifacts lie: a path or s3://."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """One worker: SQLite takes one writer at a time."""
        return [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", self.artifacts,
        ]  # fmt: skip

    def own_environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Of the server; `base` says how it gets to the artifacts."""
        return {
            **base,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes fewer
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(8),
        }

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            httpx.get(f"{self.url}/health", timeout=2).raise_for_status()
        except httpx.HTTPError:
            return False
        return True
