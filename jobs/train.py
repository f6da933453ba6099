"""Train a recipe's phases on Ray Train: `python -m jobs.train digits --workers 2 --main.epochs 30`.

Joins the cluster in RAY_ADDRESS or starts a local one. Run again after an interruption, it goes on where it stopped.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import _cli, _progress
from jobs._alone import alone
from jobs._run import RunFolder, tracked
from meanet import artifact, cluster, data, nodes
from meanet.artifact import TrainedModel
from meanet.config import DataConfig, Recipe
from meanet.data import ImageTable, Splits
from meanet.errors import exit_on_user_error
from meanet.loop import PHASES, State
from meanet.spool import Point, Spool
from meanet.stopping import leave_after
from meanet.storage import writable_directory
from meanet.tracking import Tracker
from meanet.training import check, epoch_work

_METRICS = ("loss", "validation_accuracy", "learning_rate", "seconds")
"""Of an epoch."""


@dataclass(frozen=True)
class Flags:
    """Train main, extension and cloud, and keep the model in the run's folder."""

    recipe: _cli.RecipeFlags
    """The recipe's own fields."""
    output: Path | None = None
    """The run's folder; outputs/RECIPE if not given."""
    workers: int | None = None
    """Data-parallel workers of a group; one per two CPUs of the cluster, shared by the groups, if not given."""
    parallel: bool = True
    """Train phases that do not wait for each other at the same time, where the cluster has room for a second group of
    workers: the cloud network beside main and extension block."""
    storage: str | None = None
    """Where checkpoints go: a path or s3:// that every node can write; the run's folder if not given."""
    json: bool = False
    """Print the result as JSON."""


def train(
    run: RunFolder,
    recipe: Recipe,
    tracker: Tracker,
    workers: int | None,
    storage: str | None,
    *,
    parallel: bool = True,
) -> TrainedModel:
    """The training stage, on the connected cluster."""
    splits = load_splits(recipe)
    if run.record.mlflow_run and tracker.resume_run(run.record.mlflow_run):
        begun = run.record.phase_runs.items()
        run.record.phase_runs = {phase: one for phase, one in begun if tracker.resume_run(one)}
    else:
        run.record.phase_runs = {}
        run.record.mlflow_run = tracker.start_run(f"{recipe.name}-{run.record.id}", recipe.to_dict(), _tags(run))
        tracker.log_dataset(run.record.mlflow_run, splits.table)
        skipped = splits.table.skipped
        tracker.log_text(run.record.mlflow_run, json.dumps(vars(skipped)), "skipped_rows.json")
        run.save()
    log = _PhaseLog(run, recipe, tracker)
    show = _progress.TrainingProgress(
        {name: getattr(recipe, name).epochs for name in PHASES}, epoch_work(recipe, splits)
    )
    try:
        state = cluster.train(
            recipe,
            splits,
            storage=storage or str((run.root / "train").absolute()),
            name=run.record.id,
            num_workers=workers,
            on_event=_both(show, log.on_event),
            parallel=parallel,
        )
    except BaseException:  # a point in flight must not meet the closing of the runs: SQLite takes one writer
        log.stop()
        raise
    model = artifact.from_state(state, splits)
    artifact.save(model, run.model)
    log.complete(state)
    return model


def check_cluster(splits: Splits, workers: int | None, storage: str | None, output: Path) -> str | None:
    """What only the connected cluster can tell, before an earlier run is replaced; returns the storage, absolute.

    Args:
        splits: what it will train on.
        workers: that are asked for.
        storage: for checkpoints, s3:// or a path.
        output: the run's folder, where they go else.

    Raises:
        UserError: more workers than it has CPUs; a storage that some node cannot write, or does not share.
    """
    cluster.scaling(workers, streaming=not isinstance(splits.table, ImageTable))
    if storage:
        return nodes.check_storage(storage)
    nodes.check_storage(str(writable_directory(output)))
    return None


def load_splits(recipe: Recipe) -> Splits:
    """The recipe's images, divided by its seed; what could not be used is said once."""
    return _load(recipe.data, recipe.seed)


@functools.lru_cache(maxsize=1)
def _load(config: DataConfig, seed: int) -> Splits:
    table = data.load(config)
    for line in table.skipped.lines():
        _progress.say(f"  skipped {line}")
    return data.divide(table, config, seed)


def object_store_bytes(splits: Splits) -> int:
    """What a local Ray's object store needs: workers share the pixels of a set in memory through it."""
    shared = splits.table.num_bytes if isinstance(splits.table, ImageTable) else 0
    return cluster.OBJECT_STORE_BYTES + shared


def _tags(run: RunFolder) -> dict[str, str]:
    return {"recipe": run.record.recipe, "commit": _cli.commit(), "run_folder": run.record.id}


def _both(*listeners: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def on_event(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    return on_event


class _PhaseLog:
    """A nested MLflow run per phase. Points go by a spool in the run's folder: a store that fails in mid-run costs the
    live view, not the training. `complete` logs from the final state whatever is not there yet."""

    def __init__(self, run: RunFolder, recipe: Recipe, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._params = {name: recipe.to_dict()[name] for name in ("main", "extension", "cloud")}
        self._spool = Spool(run.root / "points.jsonl", self._send, lambda text: _progress.say(f"  MLflow: {text}"))

    def on_event(self, event: dict[str, Any]) -> None:
        """Keep an epoch's metrics as it arrives."""
        if event["event"] == "epoch":
            self._spool.put(event["phase"], event["epoch"], {name: event[name] for name in _METRICS})

    def _send(self, points: Sequence[Point]) -> None:
        for phase in dict.fromkeys(point.run for point in points):
            rows = [(point.step, point.metrics) for point in points if point.run == phase]
            self._tracker.log_steps(self._run_id(phase), rows)

    def complete(self, state: State) -> None:
        """See to it that all is there, and close the phases' runs.

        Raises:
            UserError: the store stays away; what it has not got stays in the run's folder.
        """
        self._spool.close()
        for phase in self._params:
            rows = [row for row in state.history if row["phase"] == phase]
            known = self._tracker.logged_steps(self._run_id(phase), "loss")
            self._log(phase, [row for row in rows if row["epoch"] not in known])
            self._tracker.end_run(self._run_id(phase))
        parent = self._run.record.mlflow_run
        assert parent is not None, "training has a run"
        self._tracker.log_text(parent, json.dumps(state.class_precision), "class_precision.json")

    def stop(self) -> None:
        """Send no more; what has not arrived is sent when the run goes on."""
        self._spool.stop()

    def _log(self, phase: str, rows: list[dict[str, Any]]) -> None:
        self._tracker.log_steps(self._run_id(phase), [(row["epoch"], {n: row[n] for n in _METRICS}) for row in rows])

    def _run_id(self, phase: str) -> str:
        runs = self._run.record.phase_runs
        if phase not in runs:
            parent = self._run.record.mlflow_run
            runs[phase] = self._tracker.start_run(phase, self._params[phase], {"phase": phase}, parent)
            self._run.save()
        return runs[phase]


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("train", Flags)
    recipe = flags.recipe
    output = flags.output or Path("outputs") / recipe.name
    splits = load_splits(recipe)
    check(recipe, splits)  # every mistake that can be found is found before an earlier run is replaced
    tracker = Tracker(environment.tracking_uri)
    address, store = environment.ray_address, object_store_bytes(splits)
    with alone(writable_directory(output)), cluster.ray_cluster(address, store):
        storage = check_cluster(splits, flags.workers, flags.storage, output)
        run = RunFolder.begin(output, recipe, environment.tracking_uri, splits.table.digest, goal="train")
        with tracked(tracker):
            with run.stage("train"):
                model = train(run, recipe, tracker, flags.workers, storage, parallel=flags.parallel)
            assert run.record.mlflow_run is not None, "training has a run"
            tracker.end_run(run.record.mlflow_run)
    result = {"model": str(run.model), "hard_classes": list(model.hard_classes), "mlflow_run": run.record.mlflow_run}
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"model: {run.model}   hard classes, hardest first: {list(model.hard_classes)}")
        print(f"next:  python -m jobs.evaluate {recipe.name} --output {run.root}")


if __name__ == "__main__":
    leave_after(main)
