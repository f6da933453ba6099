"""Register a trained model with its operating point: `python -m jobs.register outputs/digits` -> a new version."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs import _cli
from jobs._export import export_engines
from jobs._run import tracked
from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.errors import UserError, exit_on_user_error
from meanet.onnx_export import Engines
from meanet.routing import Policy
from meanet.study import read_trials
from meanet.tracking import MODEL, Tracker


@dataclass(frozen=True)
class Flags:
    """Register the model in a run's folder as a new version of `meanet`, alias `candidate`."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder: it holds model/ and operating_point.json."""
    operating_point: Path | None = None
    """Another operating point for the same weights; the folder's own if not given."""
    trial: str | None = None
    """Of a study's folder (jobs.tune): this trial's model and operating point instead of the chosen one's."""
    engines: Engines = "int8"
    """What serving may run it by beside torch, exported into the model's folder: onnx = ONNX Runtime in float32; int8 =
    that, and 8-bit integers where validation accuracy allows; none."""
    json: bool = False
    """Print the result as JSON."""


def read_operating_point(path: Path) -> dict[str, object]:
    """An operating point that `jobs.sweep` wrote.

    Raises:
        UserError: the file is missing or no operating point.
    """
    try:
        point: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable operating point ({error}): write one with jobs.sweep") from error
    Policy.from_dict(point)
    return point


def _chosen(flags: Flags) -> tuple[Path, TrainedModel]:
    """What to register, and the folder of its weights.

    Raises:
        UserError: the folder has no such model, trial or operating point.
    """
    if flags.trial is None:
        folder = flags.folder / "model"
        model = artifact.load(folder)
        point = read_operating_point(flags.operating_point or flags.folder / "operating_point.json")
        return folder, model.with_operating_point(point)
    trials = {trial.id: trial for trial in read_trials(flags.folder / "trials") if trial.operating_point}
    if flags.trial not in trials:
        raise UserError(
            f"{flags.folder} has no trial {flags.trial!r} with an operating point: choose one of "
            f"{', '.join(trials) or '(none)'}, or give a study's folder"
        )
    own = flags.folder / "trials" / flags.trial / "model"  # trials that train nothing share the study's
    folder, chosen = own if own.exists() else flags.folder / "model", trials[flags.trial].operating_point
    assert chosen is not None, "others were left out"
    other = read_operating_point(flags.operating_point) if flags.operating_point else chosen
    return folder, artifact.load(folder).with_operating_point(other)


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse("register", Flags)
    folder, model = _chosen(flags)
    _ = model.policy  # a point of another model shows here, before anything is exported
    tracker = Tracker(environment.tracking_uri)
    exported = export_engines(model, folder, flags.engines)
    tags = {"recipe": model.recipe.name, "commit": _cli.commit()}
    with tracked(tracker):
        run = tracker.start_run(f"register-{model.recipe.name}", {}, tags)
        version = tracker.register(model, run, exported)
        tracker.end_run(run)
    if flags.json:
        print(json.dumps({"model": MODEL, "version": version, "alias": "candidate"}))
    else:
        print(f"{MODEL} version {version}, alias candidate; next: python -m jobs.promote {version}")


if __name__ == "__main__":
    main()
