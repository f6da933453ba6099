"""A run's folder: what each stage leaves for the next, and what was finished, so that the same command goes on.

run.json              which run this is, and the stages that are over
train/<id>/           Ray Train's checkpoints (elsewhere with --storage)
points.jsonl          metrics of epochs on their way to MLflow
model/                the trained model
exits.parquet         every exit's answer to every validation and test image
operating_point.json  the policy that was chosen
report.json, .html    what came of it
"""

import json
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import _progress
from meanet.config import Recipe
from meanet.errors import UserError
from meanet.stopping import sigterm_ends_the_block
from meanet.storage import writable_directory, write_text
from meanet.tracking import Tracker

_IDENTITY = ("recipe", "digest", "tracking_uri", "data_digest")
"""What must be the same for an interrupted run to go on."""
STAGES = ("train", "evaluate", "sweep", "register", "serve", "report")


@dataclass
class Record:
    """The content of run.json."""

    id: str
    recipe: str
    """Name."""
    digest: str
    """Of the whole recipe: other flags make another run."""
    tracking_uri: str
    data_digest: str = ""
    """Of the images: others make another run, for they would be divided otherwise."""
    mlflow_run: str | None = None
    phase_runs: dict[str, str] = field(default_factory=dict)
    """Phase -> MLflow run, nested below mlflow_run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Finished stages and their wall time."""
    version: int | None = None
    """Registered model version."""
    http: dict[str, Any] | None = None
    """What the server answered."""


class RunFolder:
    """One run's folder and its record."""

    def __init__(self, root: Path, record: Record, resumed: bool) -> None:
        self.root, self.record, self.resumed = root, record, resumed

    @property
    def model(self) -> Path:
        """The trained model's folder."""
        return self.root / "model"

    @property
    def exits(self) -> Path:
        """The exits table."""
        return self.root / "exits.parquet"

    def done(self, stage: str) -> bool:
        """Whether a stage is over."""
        return stage in self.record.seconds

    def save(self) -> None:
        """Write run.json."""
        write_text(json.dumps(asdict(self.record), indent=2), self.root / "run.json")

    @contextmanager
    def stage(self, name: str, heading: str | None = None) -> Iterator[None]:
        """Time a stage, and note its end; another command than the demo has its own heading for it."""
        _progress.say(heading or f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")
        started = time.perf_counter()
        yield
        self.record.seconds[name] = round(time.perf_counter() - started, 2)
        self.save()

    @staticmethod
    def begin(root: Path, recipe: Recipe, tracking_uri: str, data_digest: str, goal: str) -> "RunFolder":
        """Go on with an interrupted run of the same recipe and flags, or start a new one.

        Args:
            root: the folder.
            recipe: the whole config.
            tracking_uri: MLflow's store.
            data_digest: of the images.
            goal: the last stage of the command; a run that has reached it is finished.

        Raises:
            UserError: the folder cannot be written.
        """
        writable_directory(root)
        record = _read(root)
        asked = Record("", recipe.name, recipe.digest(), tracking_uri, data_digest)
        same = record is not None and all(getattr(record, name) == getattr(asked, name) for name in _IDENTITY)
        if record is not None and same and goal not in record.seconds:
            finished = ", ".join(record.seconds) or "nothing yet"
            _progress.say(f"going on with the interrupted run {record.id} (finished: {finished})")
            return RunFolder(root, record, resumed=True)
        _clear(root)
        identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = RunFolder(root, replace(asked, id=identity), resumed=False)
        folder.save()
        return folder

    @staticmethod
    def open(root: Path, recipe_name: str, tracking_uri: str) -> "RunFolder":
        """A run's folder that has a trained model.

        Raises:
            UserError: there is none, or it is another recipe's.
        """
        record = _read(root)
        if record is None or "train" not in record.seconds:
            raise UserError(f"{root} holds no finished training: run `python -m jobs.train {recipe_name}` first")
        if record.recipe != recipe_name:
            raise UserError(
                f"{root} holds a model of recipe {record.recipe!r}, not {recipe_name!r}: "
                "give the folder of that recipe with --output, or train it"
            )
        if record.tracking_uri != tracking_uri:
            record.mlflow_run, record.phase_runs, record.tracking_uri = None, {}, tracking_uri
        return RunFolder(root, record, resumed=True)


@contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Open MLflow runs are closed where the block fails (FAILED) or is stopped (KILLED: by Ctrl-C, or the SIGTERM of
    `ray job stop`); the same command goes on with them."""
    with sigterm_ends_the_block():
        try:
            yield
        except BaseException as error:
            why = tracker.close_open_runs("FAILED" if isinstance(error, Exception) else "KILLED")
            if why is not None:
                _progress.say(f"  MLflow goes on showing its runs as RUNNING: {why}")
            raise


def _read(root: Path) -> Record | None:
    try:
        return Record(**json.loads((root / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{root / 'run.json'} cannot be read ({error}): remove that file to start a new run there"
        ) from error


def _clear(root: Path) -> None:
    """Drop what an earlier run left; what it logged stays in MLflow."""
    for name in ("train", "model"):
        shutil.rmtree(root / name, ignore_errors=True)
    names = ("run.json", "exits.parquet", "operating_point.json", "report.json", "report.html")
    for name in (*names, "points.jsonl", "points.jsonl.sent"):
        (root / name).unlink(missing_ok=True)
