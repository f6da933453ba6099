"""Search what needs training: `python -m jobs.tune class_split digits` -> a front over trials, and a model to register.

Joins the cluster in RAY_ADDRESS or starts a local one. Run again after an interruption, it goes on where it stopped:
no finished trial runs twice. docs/tuning.md has the spaces and what comes out.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro

from jobs import _cli, _progress
from jobs._run import RunFolder
from jobs._study import Record, StudyFolder, TrialLog
from jobs.evaluate import evaluate
from jobs.sweep import sweep
from jobs.train import check_cluster, load_splits, object_store_bytes, train
from meanet import artifact, cluster, plots, study_report, tuning
from meanet.artifact import TrainedModel
from meanet.config import Recipe
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable, exits_table
from meanet.operating_point import Search
from meanet.phases import phase_keys
from meanet.routing import Policy
from meanet.storage import write_parquet, write_text
from meanet.study import Space, Trial, read_trials, trial_id
from meanet.study_report import Chosen, Facts, cheapest
from meanet.thresholds import Outcome, replay
from meanet.tracking import Tracker
from meanet.training import check
from meanet.trial import Study, keep_base, reference_of, write_trial
from meanet.tuning import Ended, Plan, SearcherName
from tune_spaces.blocks import blocks
from tune_spaces.class_split import class_split
from tune_spaces.joint import joint
from tune_spaces.policies import all_gates
from tune_spaces.training import training

SPACES: dict[str, Callable[[Recipe, int], Space]] = {
    space.__name__: space for space in (class_split, blocks, training, joint)
}


@dataclass(frozen=True)
class Flags:
    """Try configurations of a space in parallel, and keep the model of the cheapest operating point."""

    space: tyro.conf.Suppress[str]
    recipe: _cli.RecipeFlags
    """The recipe's own fields: the default configuration."""
    trials: int = 16
    """Configurations to try."""
    searcher: SearcherName = "optuna"
    """optuna: multi-objective TPE on accuracy and joules; random: for comparison."""
    output: Path | None = None
    """The study's folder, which every node can write; outputs/tune-SPACE-RECIPE if not given."""
    base: Path | None = None
    """A run's folder (jobs.train) whose main block and cloud network the trials share; trained first if not given."""
    concurrent: int | None = None
    """Trials at a time; as many as the cluster has CPUs for if not given."""
    workers_per_trial: int = 0
    """Ray Train workers of a trial; 0 trains in the trial's own process, on one CPU."""
    workers: int | None = None
    """Data-parallel workers that train the default; one per two CPUs of the cluster if not given."""
    json: bool = False
    """Print the report as JSON."""

    @property
    def plan(self) -> Plan:
        """How the study is run.

        Raises:
            UserError: a number that makes no sense.
        """
        return Plan(self.trials, self.searcher, self.concurrent, self.workers_per_trial)


class Tune:
    """The stages, each skipped if an earlier attempt has finished it."""

    def __init__(self, flags: Flags, environment: _cli.Environment) -> None:
        self.flags, self.environment, self.plan = flags, environment, flags.plan
        self.recipe: Recipe = flags.recipe
        self.root = (flags.output or Path("outputs") / f"tune-{flags.space}-{self.recipe.name}").absolute()
        self.splits = load_splits(self.recipe)
        check(self.recipe, self.splits)  # find mistakes before an earlier study is replaced
        self.space = SPACES[flags.space](self.recipe, self.splits.table.num_classes)
        _check_space(self.space, self.recipe)
        self.given = flags.base and self._given(flags.base)
        self.tracker = Tracker(environment.tracking_uri)

    def all_stages(self) -> dict[str, Any]:
        """Run what is left; returns the report."""
        with cluster.ray_cluster(self.environment.ray_address, object_store_bytes(self.splits)):
            check_cluster(self.splits, self.flags.workers, None)
            tuning.concurrent_trials(self.plan)
            self.folder = StudyFolder.begin(self.root, self._record())
            self._start_run()
            with self.folder.stage("base"):
                model, table = self.given or self._base()
                keep_base(self.root, model, self.splits.table.num_classes)
            study = self._study(table)
            log = TrialLog(self.folder, self.tracker)
            if not self.folder.done("trials"):
                with self.folder.stage("trials"), log.following():
                    ended = tuning.run_trials(study, self.splits, self.plan, self.folder.record.id)
                    self._keep(study, ended)
        with self.folder.stage("report"):
            return self._report(study, table, log)

    def _record(self) -> Record:
        plan = {name: getattr(self.flags, name) for name in ("trials", "searcher", "workers_per_trial")}
        return Record(
            id="",
            space=self.flags.space,
            recipe=self.recipe.name,
            digest=self.recipe.digest(),
            data_digest=self.splits.table.digest,
            tracking_uri=self.environment.tracking_uri,
            plan={**plan, "base": str(self.flags.base.absolute()) if self.flags.base else None},
        )

    def _start_run(self) -> None:
        record = self.folder.record
        if record.mlflow_run is not None and self.tracker.has_run(record.mlflow_run):
            return
        tags = {"recipe": record.recipe, "space": record.space, "commit": _cli.commit(), "study": record.id}
        name = f"tune-{record.space}-{record.recipe}-{record.id}"
        record.mlflow_run = self.tracker.start_run(name, self.recipe.to_dict() | record.plan, tags)
        record.trial_runs, record.logged = {}, []
        self.tracker.log_dataset(record.mlflow_run, self.splits.table)
        self.folder.save()

    # The default

    def _given(self, base: Path) -> tuple[TrainedModel, ExitsTable]:
        """Another run's model and exits table.

        Raises:
            UserError: they are not what this recipe would train on these images.
        """
        model = artifact.load(base / "model")
        ours, theirs = self._keys(self.recipe), self._keys(model.recipe)
        other = [phase for phase in ("main", "cloud") if ours[phase] != theirs[phase]]
        if model.data_digest != self.splits.table.digest or other:
            what = (
                f"its {' and '.join(other)} phase was trained by other settings" if other else "its images are others"
            )
            raise UserError(f"--base {base} does not fit {self.recipe.name!r} and these flags: {what}; train it anew")
        return model, ExitsTable.read(base / "exits.parquet")

    def _keys(self, recipe: Recipe) -> dict[str, str]:
        return phase_keys(recipe, self.splits.table.digest, self.splits.table.num_classes)

    def _base(self) -> tuple[TrainedModel, ExitsTable]:
        """Train and evaluate the default as `jobs.train` and `jobs.evaluate` do, unless that is done."""
        root, digest = self.root / "base", self.splits.table.digest
        store = self.environment.tracking_uri
        if _evaluated(root, self.recipe, digest):
            return artifact.load(root / "model"), ExitsTable.read(root / "exits.parquet")
        run = RunFolder.begin(root, self.recipe, store, digest, goal="evaluate")
        if run.record.mlflow_run is None:
            tags = {"recipe": self.recipe.name, "space": self.flags.space}
            run.record.mlflow_run = self.tracker.start_run("base", self.recipe.to_dict(), tags, self._mlflow_run)
        if not run.done("train"):
            with run.stage("train", "  the default: train"):
                train(run, self.recipe, self.tracker, self.flags.workers, None)
        with run.stage("evaluate", "  the default: evaluate"):
            model = artifact.load(run.model)
            table = evaluate(run, model)
        self.tracker.end_run(run.record.mlflow_run)
        return model, table

    # The trials

    def _study(self, table: ExitsTable) -> Study:
        exits = table.exits("validation")
        gates = all_gates().gates
        reference = reference_of(exits, table.costs)
        return Study(str(self.root), self.recipe, self.space, gates, reference, exits, self._mlflow_run)

    def _keep(self, study: Study, ended: list[Ended]) -> None:
        """Leave a record of the trials that the scheduler stopped, too; say which failed.

        Raises:
            UserError: no trial finished.
        """
        finished = {trial.id for trial in read_trials(study.trials)}
        for one in ended:
            name = trial_id(one.params)
            if one.error:
                self.failed[name] = one.error
                _progress.say(f"  trial {name} failed: {one.error}")
            elif name not in finished and one.measured is not None:
                write_trial(Trial(name, one.params, "stopped", one.measured, ()), study.trials / name)
        if not finished:
            raise UserError(
                f"no trial of the study finished: {next(iter(self.failed.values()), 'none was started')}; mend that, "
                "and give the same command again"
            )

    @cached_property
    def failed(self) -> dict[str, str]:
        """Trial -> what it failed with."""
        return {}

    # The report

    def _report(self, study: Study, table: ExitsTable, log: TrialLog) -> dict[str, Any]:
        trials = read_trials(study.trials)
        log.complete(trials)
        best = cheapest(trials)
        chosen = self._choose(study, best, table)
        facts = self._facts(study, table, trials)
        report = study_report.build(trials, facts, chosen)
        study_report.write(self.root, report, trials, facts)
        self._log(report, trials, facts)
        return report

    def _choose(self, study: Study, best: Trial, table: ExitsTable) -> Chosen:
        """The chosen trial's model, exits and operating point into the study's folder, for `jobs.register`."""
        model = artifact.load(study.trials / best.id / "model")
        own = ExitsTable(exits_table(model, self.splits))
        found, default = self._search(own), self._search(table)
        shutil.rmtree(self.root / "model", ignore_errors=True)
        artifact.save(model.with_operating_point(found.chosen), self.root / "model")
        write_parquet(own.table, self.root / "exits.parquet")
        write_text(json.dumps(found.chosen, indent=2), self.root / "operating_point.json")
        return Chosen(best, found.chosen, _on_test(own, found), _on_test(table, default))

    def _search(self, table: ExitsTable) -> Search:
        return sweep(table, "all_gates", self.recipe.operating_point, self._mlflow_run)

    def _facts(self, study: Study, table: ExitsTable, trials: list[Trial]) -> Facts:
        default = next((t for t in trials if t.id == trial_id(self.space.first[0]) and t.front), None)
        names = ("report.json", "report.html", "union_front.csv", "exits.parquet", "operating_point.json", "model")
        return Facts(
            space=self.space,
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            searcher=self.plan.searcher,
            commit=_cli.commit(),
            reference=study.reference,
            default=default.front if default else (),
            default_name=f"the default's front (trial {default.id})" if default else "the default's front",
            failed=self.failed,
            seconds=dict(self.folder.record.seconds),
            files={name: str(self.root / name) for name in names},
        )

    def _log(self, report: dict[str, Any], trials: list[Trial], facts: Facts) -> None:
        run = self._mlflow_run
        rows = [(step, {"hypervolume": v}) for step, v in enumerate(report["hypervolume"]["by_trial"], 1)]
        self.tracker.log_steps(run, rows)
        for name, figure in study_report.figures(trials, facts).items():
            path = plots.save_png(figure, self.root / f"{name}.png")
            self.tracker.log_file(run, path, "plots")
        for name in ("report.json", "report.html", "union_front.csv", "operating_point.json"):
            self.tracker.log_file(run, self.root / name)
        self.tracker.log_text(run, json.dumps(report["union_front"], indent=1), "union_front.json")
        self.tracker.end_run(run)

    @property
    def _mlflow_run(self) -> str:
        run = self.folder.record.mlflow_run
        assert run is not None, "a study has a run"
        return run


def _check_space(space: Space, recipe: Recipe) -> None:
    if not space.parameters:
        raise UserError(f"space {space.name!r} has nothing that can vary for recipe {recipe.name!r}: choose another")


def _evaluated(root: Path, recipe: Recipe, data_digest: str) -> bool:
    """Whether a run's folder holds this recipe's model and its exits."""
    try:
        record = json.loads((root / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = (record.get("digest"), record.get("data_digest")) == (recipe.digest(), data_digest)
    return same and "evaluate" in record.get("seconds", {})


def _on_test(table: ExitsTable, found: Search) -> Outcome:
    return replay(table.exits("test"), table.costs, Policy.from_dict(found.chosen))


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("tune", Flags, before={"space": SPACES})
    study = Tune(flags, environment)
    report = study.all_stages()
    if flags.json:
        print(json.dumps(report))
        return
    print(f"\n{report['summary']}\n\nreport:  {study.root / 'report.html'}  (and report.json, union_front.csv)")
    print(f"next:    python -m jobs.register {study.root}   (another trial's model: --trial ID)")


if __name__ == "__main__":
    main()
