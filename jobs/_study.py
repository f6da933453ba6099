"""A study's folder, and what MLflow hears of its trials while they run.

study.json             which study this is, and the stages that are over
base/                  the default, trained and evaluated: a run's folder
phases/                what phases have trained, by what determines it (kept when another study begins here)
trials/<id>/           a finished trial: trial.json, model/
progress/<id>.jsonl    what a trial says while it runs
tune/<study>/          Ray Tune's own record
model/, exits.parquet, operating_point.json    of the chosen trial, as jobs.register takes them
report.json, report.html, union_front.csv      what came of it
"""

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import _progress
from meanet import plots
from meanet.errors import UserError
from meanet.storage import writable_directory, write_text
from meanet.study import Params, Trial, read_trials
from meanet.study_report import front_figure
from meanet.tracking import Tracker
from meanet.trial import RUNGS

STAGES = ("base", "trials", "report")
REPORTS = ("report.json", "report.html", "union_front.csv")
RESULTS = ("model", "trials", "tune", "exits.parquet", "operating_point.json", *REPORTS)
"""What others may want of a study that is over."""
_IDENTITY = ("space", "recipe", "digest", "data_digest", "tracking_uri", "plan")
"""What must be the same for an interrupted study to go on."""


@dataclass
class Record:
    """The content of study.json."""

    id: str
    space: str
    recipe: str
    """Name."""
    digest: str
    """Of the whole recipe."""
    data_digest: str
    """Of the images, or of the exits table."""
    tracking_uri: str
    plan: dict[str, Any]
    """The flags that decide what is tried."""
    mlflow_run: str | None = None
    trial_runs: dict[str, str] = field(default_factory=dict)
    """Trial -> MLflow run, nested below mlflow_run."""
    logged: list[str] = field(default_factory=list)
    """Trials whose runs are whole."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Finished stages and their wall time, of the attempt that finished each."""


class StudyFolder:
    """One study's folder and its record."""

    def __init__(self, root: Path, record: Record, resumed: bool) -> None:
        self.root, self.record, self.resumed = root, record, resumed
        self._lock = threading.Lock()

    def done(self, stage: str) -> bool:
        """Whether a stage is over."""
        return stage in self.record.seconds

    def save(self) -> None:
        """Write study.json."""
        with self._lock:
            write_text(json.dumps(asdict(self.record), indent=2), self.root / "study.json")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and note its end."""
        _progress.say(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")
        started = time.perf_counter()
        yield
        self.record.seconds[name] = round(time.perf_counter() - started, 2)
        self.save()

    @staticmethod
    def begin(root: Path, asked: Record) -> "StudyFolder":
        """Go on with an interrupted study of the same space, recipe and flags, or start a new one.

        Raises:
            UserError: the folder cannot be written, or its record is damaged.
        """
        writable_directory(root)
        record = _read(root)
        same = record is not None and all(getattr(record, name) == getattr(asked, name) for name in _IDENTITY)
        if record is not None and same and "report" not in record.seconds:
            finished = len(read_trials(root / "trials"))
            _progress.say(f"going on with the interrupted study {record.id} ({finished} trials finished)")
            return StudyFolder(root, record, resumed=True)
        _clear(root)
        folder = StudyFolder(root, replace(asked, id=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"), False)
        folder.save()
        return folder


def _read(root: Path) -> Record | None:
    try:
        return Record(**json.loads((root / "study.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{root / 'study.json'} cannot be read ({error}): remove that file to start a new study there"
        ) from error


def _clear(root: Path) -> None:
    """Drop what an earlier study left, but not what its phases have trained: a key says what each is good for."""
    for name in ("trials", "progress", "tune", "model"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("study.json", "exits.parquet", "operating_point.json", *REPORTS):
        (root / name).unlink(missing_ok=True)


class News:
    """What trials say in a study's folder, each line once; a trial that begins again is news from its first line."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "progress"
        self._seen: dict[Path, list[dict[str, Any]]] = {}

    def read(self) -> list[dict[str, Any]]:
        """Events since the last time, a trial after the other."""
        news = []
        for path in sorted(self._folder.glob("*.jsonl")):
            events, seen = _events(path), self._seen.get(path, [])
            news += events[len(seen) if events[:1] == seen[:1] else 0 :]
            self._seen[path] = events
        return news


def _events(path: Path) -> list[dict[str, Any]]:
    """Without a last line that is not whole yet; none where the trial has not begun, or begins again just now."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


class TrialLog:
    """A nested MLflow run a trial, as it runs. A store that fails costs the live view, not the study:

    `complete` logs whatever is not there yet, and nothing twice.
    """

    def __init__(self, folder: StudyFolder, tracker: Tracker) -> None:
        self._folder, self._tracker = folder, tracker
        self._failed = False
        self._to_show, self._to_log = News(folder.root), News(folder.root)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Show and log what trials say until the block is over, in a thread each: a slow store holds up no line.

        What an interrupted attempt has said is over; `complete` logs what was missed of it.
        """
        self._to_show.read()
        self._to_log.read()
        with (
            _progress.repeated(self._log_news, 0.5, "meanet-study-log"),
            _progress.repeated(self._show_news, 0.5, "meanet-study"),
        ):
            yield

    def _show_news(self) -> None:
        for event in self._to_show.read():
            _progress.say(_line(event))

    def _log_news(self) -> None:
        for event in self._to_log.read():
            if self._failed:
                return
            try:
                self._log(event)
            except Exception as error:  # MLflow's client raises many kinds
                self._failed = True
                _progress.say(f"  MLflow does not answer ({type(error).__name__}): trials are logged when all are over")

    def _log(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._run(event["trial"], event["params"])
        elif event["event"] == "rung" and event["trial"] in self._folder.record.trial_runs:
            self._tracker.log_steps(self._folder.record.trial_runs[event["trial"]], [(event["rung"], _figures(event))])

    def _run(self, name: str, params: Params) -> str:
        """The trial's run."""
        record = self._folder.record
        if name not in record.trial_runs:
            tags = {"trial": name, "space": record.space, "recipe": record.recipe}
            record.trial_runs[name] = self._tracker.start_run(f"trial-{name}", params, tags, record.mlflow_run)
            self._folder.save()
        return record.trial_runs[name]

    def _rungs(self, name: str) -> list[tuple[int, dict[str, float]]]:
        """What a trial has shown before its last: MLflow, where it was away, has not heard of it."""
        events = _events(self._folder.root / "progress" / f"{name}.jsonl")
        return [(event["rung"], _figures(event)) for event in events if event["event"] == "rung"]

    def complete(self, trials: Sequence[Trial]) -> None:
        """Front, figure and last figures of every trial that is not logged whole."""
        record = self._folder.record
        for trial in trials:
            if trial.id in record.logged:
                continue
            run = self._run(trial.id, trial.params)
            known = self._tracker.logged_steps(run, "hypervolume")
            missing = [(rung, row) for rung, row in self._rungs(trial.id) if rung not in known]
            self._tracker.log_steps(run, [*missing, (RUNGS, asdict(trial.measured))])
            self._tracker.log_text(run, json.dumps(trial.to_dict(), indent=1), "front.json")
            if len(trial.front) > 1:
                path = plots.save_png(front_figure(trial), self._folder.root / f"front-{trial.id}.png")
                self._tracker.log_file(run, path, "plots")
                path.unlink()
            self._tracker.end_run(run, "FINISHED" if trial.state == "finished" else "KILLED")
            record.logged.append(trial.id)
            self._folder.save()
        for name in set(record.trial_runs) - {*record.logged}:
            self._tracker.end_run(record.trial_runs[name], "FAILED")


def _figures(event: dict[str, Any]) -> dict[str, float]:
    return {name: event[name] for name in ("accuracy", "joules", "hypervolume")}


def _line(event: dict[str, Any]) -> str:
    head = f"  trial {event['trial']}"
    if event["event"] == "start":
        return f"{head} started: " + " ".join(f"{name}={_short(value)}" for name, value in event["params"].items())
    figures = (
        f"hypervolume {event['hypervolume']:.4f}  best point {event['accuracy']:.2%} at {1e6 * event['joules']:.2f} µJ"
    )
    if event["event"] == "rung":
        return f"{head} rung {event['rung']}/{RUNGS}  {figures}"
    return f"{head} {event['state']}  {figures}  {event['seconds']:.1f} s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
