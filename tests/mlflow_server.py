"""A real MLflow server as a process that tests stop and start again: SQLite behind it, artifacts through it."""

import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import ENVIRONMENT

from jobs._mlflow_server import MlflowServer as Server
from jobs._processes import free_ports


class MlflowServer:
    """May be stopped and started again over the same store."""

    def __init__(self, folder: Path, artifacts: str, environment: dict[str, str]) -> None:
        """Artifacts lie at a path or s3://; the environment says how to get there."""
        self.folder, self._environment = folder, environment
        self._server = Server(folder, free_ports(1)[0], artifacts)
        self.url = self._server.url
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._server.command,
                env=self._server.own_environment(ENVIRONMENT | self._environment),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._server.ready():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """It and its workers, by their process group."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
