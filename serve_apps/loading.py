"""From the registry to what a replica runs: the edge's replica loads no cloud weights, and no torch where it runs ONNX.
Each version is tried once before anybody depends on it; two over the same weights share what runs them.

A version is fetched in a process of its own (`python -m serve_apps.loading URI VERSION FOLDER`): the registry's client
takes hundreds of megabytes and seconds of the interpreter, which a replica that answers has no use for.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from meanet import engines, model_spec
from meanet.errors import UserError, exit_on_user_error
from meanet.preprocessing import Preprocessing, encode_png
from meanet.runtime import CloudRuntime, Images
from serve_apps.cloud_calls import CloudRequest
from serve_apps.served import Served

_KEPT_S = 120.0


@dataclass(frozen=True)
class CloudVersion:
    """What the cloud answers a version's requests with."""

    version: int
    preprocessing: Preprocessing
    runtime: CloudRuntime
    weights: str
    """Digest of the cloud's weights and the engine that runs them."""

    def classify(self, request: CloudRequest) -> tuple[list[int], list[float]]:
        """Class ids and confidences of N samples; NaN where the logits are not finite, for they are no answer."""
        reading = self.runtime.run(request.pixels(self.preprocessing))
        confidence = np.where(np.isfinite(reading.entropy), reading.confidence, np.nan)
        return reading.pred.tolist(), confidence.tolist()


@dataclass(frozen=True)
class Loader:
    """From one MLflow store."""

    tracking_uri: str
    engine: str = "auto"
    """What runs the networks, as `meanet.engines` names it."""
    node: str = ""
    """Ray's id of the node that this is on."""

    def edge(self, version: int, held: dict[int, Served]) -> Served:
        """A version for an edge replica, on one thread.

        Raises:
            UserError: it cannot be fetched or loaded, has no such engine, or says nothing of an image.
        """
        with fetched(self.tracking_uri, version) as folder:
            weights = self._weights(folder, model_spec.EDGE)
            twin = next((one for one in held.values() if one.weights == weights), None)
            engine = twin.runtime.engine if twin else engines.open_edge(folder, self.engine)
            served = Served.of(model_spec.read(folder), version, engine)
        answers, _ = served.runtime.run(blank(served.model.preprocessing), served.policy)
        _require_finite(answers.entropy, version, "main exit")
        return replace(served, weights=weights, node=self.node)

    def cloud(self, version: int, held: dict[int, CloudVersion]) -> CloudVersion:
        """A version for a cloud replica, on one thread.

        Raises:
            UserError: as `edge`.
        """
        with fetched(self.tracking_uri, version) as folder:
            weights = self._weights(folder, model_spec.CLOUD)
            twin = next((one for one in held.values() if one.weights == weights), None)
            engine = twin.runtime.engine if twin else engines.open_cloud(folder, self.engine)
            spec = model_spec.read(folder)
        loaded = CloudVersion(version, spec.preprocessing, CloudRuntime(spec, engine), weights)
        _require_finite(loaded.runtime.run(blank(spec.preprocessing)).entropy, version, "cloud's network")
        return loaded

    def _weights(self, folder: Path, file: str) -> str:
        """What makes two versions' engines the same: weights, how images are scaled, and the files that are run."""
        name = engines.choose(folder, self.engine)
        if not (folder / file).exists():
            raise UserError(f"{folder} is not a whole model ({file} is missing): register it again")
        parts = [name, engines.digest(folder / file), str(model_spec.read(folder).preprocessing)]
        if name == "torch":
            _one_thread()
        elif exported := engines.Exported.read(folder):
            parts += [f"{key}={value}" for key, value in sorted(exported.files.items())]
        return " ".join(parts)


@contextmanager
def fetched(tracking_uri: str, version: int) -> Iterator[Path]:
    """The model's folder of a version, while the block runs: fetched once for all replicas of a machine that want it
    at about the same time. They wait for each other while it is fetched, and read it together.

    Raises:
        UserError: it cannot be fetched.
    """
    name = f"{hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]}-{version}"
    with _shared_place() as place, (place / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as long as anybody reads it, it is not forgotten
        _forget_old(place)
        done = place / f"{name}.done"
        if not done.exists():
            with (place / f"{name}.fetching").open("a") as fetching:
                fcntl.flock(fetching, fcntl.LOCK_EX)  # the others wait for the first; no lock is ever converted
                if not done.exists():
                    shutil.rmtree(place / name, ignore_errors=True)
                    (place / name).mkdir()
                    part = done.with_suffix(".part")
                    part.write_text(_fetch(tracking_uri, version, place / name))
                    part.rename(done)  # there as a whole, or not at all
        yield Path(done.read_text())


def _fetch(tracking_uri: str, version: int, folder: Path) -> str:
    words = [sys.executable, "-m", "serve_apps.loading", tracking_uri, str(version), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise UserError(f"version {version} cannot be fetched from {tracking_uri}: {done.stderr.strip()[-1000:]}")
    return done.stdout.splitlines()[-1]


@contextmanager
def _shared_place() -> Iterator[Path]:
    """A folder of this cluster's on this machine, which goes with it; outside a cluster, of this call's."""
    node: Any = ray._private.worker._global_node
    if node is None:
        with tempfile.TemporaryDirectory(prefix="meanet-versions-") as folder:
            yield Path(folder)
    else:
        place = Path(node.get_session_dir_path()) / "meanet-versions"
        place.mkdir(mode=0o700, exist_ok=True)
        yield place


def _forget_old(place: Path) -> None:
    """Versions that were fetched a while ago, and that nobody reads: whoever wanted them has them.

    Other replicas do the same at the same time.
    """
    for done in place.glob("*.done"):
        if not _is_old(done):
            continue
        with done.with_suffix(".lock").open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_old(done):  # still: it may have been forgotten, and fetched anew
                shutil.rmtree(place / done.stem, ignore_errors=True)
                done.unlink(missing_ok=True)


def _is_old(done: Path) -> bool:
    """Whether it is there, and has been for a while."""
    try:
        return time.time() - done.stat().st_mtime >= _KEPT_S
    except FileNotFoundError:
        return False


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def blank(taken: Preprocessing) -> Images:
    """(1, H, W, C), black, read as clients' files are: the first takes several times as long as those that follow."""
    return taken.decode(encode_png(np.zeros((taken.height, taken.width, taken.channels), dtype=np.uint8)))[None]


def _require_finite(entropy: Any, version: int, what: str) -> None:
    if not np.isfinite(entropy).all():
        raise UserError(f"the {what} of version {version} says nothing of a blank image: its weights are broken")


@exit_on_user_error
def main() -> None:
    """Fetch, and print where the model's folder is."""
    from meanet.tracking import Tracker

    tracking_uri, version, folder = sys.argv[1:]
    print(Tracker(tracking_uri).download_to(int(version), Path(folder)))


if __name__ == "__main__":
    main()
