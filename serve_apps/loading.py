"""From the registry to what a replica runs: the edge's replica loads no cloud weights, and no torch where it runs ONNX.

A version is fetched in a process of its own (`python -m serve_apps.loading URI VERSION FOLDER`): the registry's client
takes hundreds of megabytes and seconds of the interpreter, which a replica that answers has no use for.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meanet import engines, model_spec
from meanet.errors import UserError, exit_on_user_error
from meanet.preprocessing import Preprocessing
from meanet.runtime import CloudRuntime
from serve_apps.served import Served


def load_edge(tracking_uri: str, version: int, engine: str = "auto") -> Served:
    """A version as the edge answers with it, on one thread.

    Raises:
        UserError: it cannot be fetched, is not whole, or has no such engine.
    """
    with fetched(tracking_uri, version) as folder:
        if engines.choose(folder, engine) == "torch":
            _one_thread()
            return Served.of(engines.in_networks(folder), version)
        return Served.of(model_spec.read(folder), version, engines.open_edge(folder, engine))


def load_cloud(tracking_uri: str, version: int, engine: str = "auto") -> tuple[CloudRuntime, Preprocessing]:
    """A version's cloud network, on one thread, and how images become what it takes.

    Raises:
        UserError: as `load_edge`.
    """
    with fetched(tracking_uri, version) as folder:
        if engines.choose(folder, engine) == "torch":
            _one_thread()
            model = engines.in_networks(folder)
            return CloudRuntime(model), model.preprocessing
        spec = model_spec.read(folder)
        return CloudRuntime(spec, engines.open_cloud(folder, engine)), spec.preprocessing


@contextmanager
def fetched(tracking_uri: str, version: int) -> Iterator[Path]:
    """The model's folder of a version, while the block runs.

    Raises:
        UserError: it cannot be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="meanet-version-") as folder:
        words = [sys.executable, "-m", "serve_apps.loading", tracking_uri, str(version), folder]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise UserError(f"version {version} cannot be fetched from {tracking_uri}: {done.stderr.strip()[-1000:]}")
        yield Path(done.stdout.splitlines()[-1])


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@exit_on_user_error
def main() -> None:
    """Fetch, and print where the model's folder is."""
    from meanet.tracking import Tracker

    tracking_uri, version, folder = sys.argv[1:]
    print(Tracker(tracking_uri).download_to(int(version), Path(folder)))


if __name__ == "__main__":
    main()
