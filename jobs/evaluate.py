"""Run every network of a trained model once: `python -m jobs.evaluate digits` writes the exits table."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import _cli
from jobs._alone import alone
from jobs._run import RunFolder
from jobs.train import load_splits
from meanet import artifact, storage
from meanet.artifact import TrainedModel
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable, exits_table
from meanet.policies import authors_threshold, baselines
from meanet.recipes import recipe
from meanet.tracking import Tracker


@dataclass(frozen=True)
class Flags:
    """Evaluate the model in the run's folder on validation and test."""

    recipe: _cli.RecipeFlags
    """Names the recipe; the model's own stored config is what is evaluated, but for `--energy` if given."""
    output: Path | None = None
    """The run's folder; outputs/RECIPE if not given."""
    exits: str | None = None
    """Where the exits table is written as well, a path or s3://."""
    json: bool = False
    """Print the result as JSON."""


def evaluate(run: RunFolder, model: TrainedModel) -> ExitsTable:
    """The evaluation stage: the exits table in the run's folder.

    Raises:
        UserError: the data is not what the model was trained on.
    """
    splits = load_splits(model.recipe)
    if splits.table.digest != model.data_digest:
        raise UserError(
            f"the data of {model.recipe.data.source!r} is not what this model was trained on (digest "
            f"{splits.table.digest[:12]}, then {model.data_digest[:12]}): train again, or restore the data"
        )
    table = exits_table(model, splits)
    storage.write_parquet(table, run.exits)
    return ExitsTable(table, run.exits)


def evaluate_folder(output: Path, flags: Flags, tracking_uri: str) -> tuple[RunFolder, ExitsTable]:
    """Evaluate the model in a run's folder, and keep the exits table where the flags say.

    Raises:
        UserError: there is no model of the recipe and its flags; the data is not what it was trained on.
    """
    run = RunFolder.open(output, flags.recipe.name, tracking_uri)
    model = artifact.load(run.model)
    if model.recipe.name != flags.recipe.name:
        raise UserError(
            f"{run.model} holds a model of recipe {model.recipe.name!r}, not {flags.recipe.name!r}: give the folder of "
            "that recipe with --output, or train it"
        )
    named = recipe(flags.recipe.name)
    asked, usual = vars(flags.recipe.energy), vars(named.energy)
    energy = replace(model.recipe.energy, **{key: asked[key] for key in asked if asked[key] != usual[key]})
    model = replace(model, recipe=replace(model.recipe, energy=energy))  # no part of training
    if replace(flags.recipe, energy=energy) not in (model.recipe, replace(named, energy=energy)):
        raise UserError(
            f"the flags ask for another recipe than {run.root} was trained by: evaluation runs the trained "
            "model as it is; drop the flags (those of --energy may stay), or train with them"
        )
    if flags.exits:
        storage.check_writable(flags.exits.rpartition("/")[0] or ".")
    with run.stage("evaluate"):
        table = evaluate(run, model)
        if flags.exits:
            storage.write_parquet(storage.read_parquet(run.exits), flags.exits)
    if run.record.mlflow_run:
        Tracker(tracking_uri).log_file(run.record.mlflow_run, run.exits)
    return run, table


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("evaluate", Flags)
    output = flags.output or Path("outputs") / flags.recipe.name
    with alone(output):
        run, table = evaluate_folder(output, flags, environment.tracking_uri)
    outcomes = baselines(table.exits("test"), table.costs, authors_threshold(table.exits("validation")))
    accuracy = {name: outcome.accuracy for name, outcome in outcomes.items()}
    if flags.json:
        print(json.dumps({"exits": flags.exits or str(run.exits), "split": "test", "accuracy": accuracy}))
        return
    for name, value in accuracy.items():
        print(f"{name:<18} test accuracy {value:.2%}")
    exits = flags.exits or run.exits
    print(f"exits table: {exits}\nnext:        python -m jobs.sweep {exits}")


if __name__ == "__main__":
    main()
