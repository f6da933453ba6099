"""The whole life of a model, from images to HTTP answers: `python -m jobs.demo digits` (or `make demo`).

train -> evaluate -> sweep -> register and promote -> serve, every test image over HTTP -> report. Interrupted, the same
command goes on after the last finished stage; finished, it is a new run.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import _cli, _progress, _server
from jobs._alone import alone
from jobs._export import export_engines
from jobs._run import RunFolder, tracked
from jobs.evaluate import evaluate
from jobs.sweep import sweep
from jobs.train import check_cluster, load_splits, object_store_bytes, train
from meanet import artifact, cluster, plots, report
from meanet.artifact import TrainedModel
from meanet.config import Recipe
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable
from meanet.onnx_export import Engines
from meanet.operating_point import Search
from meanet.stopping import leave_after
from meanet.storage import writable_directory, write_text
from meanet.tracking import Tracker
from meanet.training import check

_PATIENCE_S = 60.0
"""On a busy machine the cloud's own deadline passes; whoever waits is answered as the exits table says."""


@dataclass(frozen=True)
class Flags:
    """Train, search, register, serve, classify the test split over HTTP, and report."""

    recipe: _cli.RecipeFlags
    """The recipe's own fields."""
    output: Path = Path("outputs/demo")
    """The run's folder."""
    workers: int | None = None
    """Data-parallel workers; one per two CPUs of the cluster if not given."""
    storage: str | None = None
    """Where checkpoints go: a path or s3:// that every node can write; the run's folder if not given."""
    engines: Engines = "onnx"
    """As jobs.register's. float32 by default: every answer over HTTP is compared with the exits table."""
    force: bool = False
    """Replace a champion of another recipe."""
    json: bool = False
    """Print report.json instead of the table."""


class Demo:
    """The stages, each skipped if an earlier attempt has finished it."""

    def __init__(self, flags: Flags, environment: _cli.Environment) -> None:
        self.flags, self.environment = flags, environment
        self.recipe: Recipe = flags.recipe
        self.splits = load_splits(self.recipe)
        check(self.recipe, self.splits)  # find mistakes before an earlier run is replaced
        self.tracker = Tracker(environment.tracking_uri)
        self.tracker.check_champion(self.recipe.name, force=flags.force)

    def all_stages(self) -> dict[str, Any]:
        """Run what is left; returns the report."""
        with cluster.ray_cluster(self.environment.ray_address, object_store_bytes(self.splits)) as address:
            storage = check_cluster(self.splits, self.flags.workers, self.flags.storage, self.flags.output)
            digest, store = self.splits.table.digest, self.environment.tracking_uri
            self.run = RunFolder.begin(self.flags.output, self.recipe, store, digest, goal="report")
            with tracked(self.tracker):
                if not self.run.done("train"):
                    with self.run.stage("train"):
                        train(self.run, self.recipe, self.tracker, self.flags.workers, storage)
                self.tracker.resume_run(self._mlflow_run)
                table = self._evaluate()
                found = self._sweep(table)
                if not self.run.done("register"):
                    with self.run.stage("register"):
                        self._register(found)
                if not self.run.done("serve"):
                    with self.run.stage("serve"):
                        self._serve(table, found, address)
        with tracked(self.tracker), self.run.stage("report"):
            return self._report(table, found)

    def _evaluate(self) -> ExitsTable:
        if self.run.done("evaluate"):
            return ExitsTable.read(self.run.exits)
        with self.run.stage("evaluate"):
            return evaluate(self.run, self._model())

    def _model(self) -> TrainedModel:
        model = artifact.load(self.run.model)
        if model.recipe != self.recipe:
            raise UserError(f"{self.run.model} holds a model of another recipe or other flags: remove {self.run.root}")
        return model

    def _sweep(self, table: ExitsTable) -> Search:
        """Milliseconds, so done again on resuming: the same table gives the same point."""
        with self.run.stage("sweep"):
            found = sweep(table, "early_gates", self.recipe.operating_point, self.run.record.mlflow_run)
            write_text(json.dumps(found.chosen, indent=2), self.run.root / "operating_point.json")
            _progress.say(f"  {found.points} operating points compared on validation in {found.seconds:.2f} s")
            return found

    def _register(self, found: Search) -> None:
        model = self._model().with_operating_point(found.chosen)
        exported = export_engines(model, self.run.model, self.flags.engines, self.splits)
        version = self.tracker.register(model, self._mlflow_run, exported)
        self.tracker.promote(version, force=self.flags.force)
        self.run.record.version = version
        _progress.say(f"  meanet version {version} is candidate, then champion")

    def _serve(self, table: ExitsTable, found: Search, address: str) -> None:
        version = self.run.record.version
        assert version is not None, "register comes before serve"
        with _server.serving(version, address, self.run.root, self.environment.tracking_uri) as url:
            http = _server.classify_all(url, self.splits, table, found.chosen, patience_s=_PATIENCE_S)
        self.run.record.http = http
        _progress.say(f"  {http['images']} test images over HTTP, {http['mismatches']} unlike the exits table")
        if http["asked_again"]:
            _progress.say(f"  {http['asked_again']} were sent again: the cloud had not answered in time")
        if http["degraded"]:
            raise UserError(
                f"{http['degraded']} images went without the cloud, again and again for {_PATIENCE_S:.0f} s: "
                f"{http['reasons']}; {self.run.root / 'serve.log'} may say why, and the same command goes on from here"
            )
        if http["mismatches"]:
            raise UserError(f"{http['mismatches']} answers over HTTP differ from the exits table: {http['examples']}")

    def _report(self, table: ExitsTable, found: Search) -> dict[str, Any]:
        root = self.run.root
        files = {name: str(root / name) for name in ("report.json", "report.html", "exits.parquet", "model")}
        facts = report.Facts(self.recipe.seed, _cli.commit(), dict(self.run.record.seconds), files)
        result = report.build(table, found, facts)
        result["http"], result["model_version"] = self.run.record.http, self.run.record.version
        report.write(root, result, table, found)
        self._log(result, table, found)
        return result

    def _log(self, result: dict[str, Any], table: ExitsTable, found: Search) -> None:
        for policy, figures in result["policies"].items():
            row = {"accuracy": figures["accuracy"], "cloud_share": figures["share"]["cloud"]}
            row["joules"] = sum(figures["joules"].values())
            self.tracker.log_steps(self._mlflow_run, [(0, {f"test/{policy}/{k}": v for k, v in row.items()})])
        for name, figure in plots.all_figures(result, table, found).items():
            path = plots.save_png(figure, self.run.root / f"{name}.png")
            self.tracker.log_file(self._mlflow_run, path, "plots")
            path.unlink()
        for name in ("report.json", "report.html", "exits.parquet", "operating_point.json"):
            self.tracker.log_file(self._mlflow_run, self.run.root / name)
        self.tracker.end_run(self._mlflow_run)

    @property
    def _mlflow_run(self) -> str:
        run = self.run.record.mlflow_run
        assert run is not None, "training has a run"
        return run


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("demo", Flags)
    flags = dataclasses.replace(flags, output=flags.output.absolute())
    demo = Demo(flags, environment)
    with alone(writable_directory(flags.output)):
        result = demo.all_stages()
    if flags.json:
        print(json.dumps(result))
        return
    print(f"\n{report.text_table(result)}\n\n{report.summary(result)}\n")
    print(f"report:  {flags.output / 'report.html'}  (and report.json)")
    print("more:    make serve   serves this model over HTTP")
    print("         make mlflow  shows every run, metric and model version")


if __name__ == "__main__":
    leave_after(main)
