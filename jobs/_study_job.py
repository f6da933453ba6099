"""What all studies of `jobs.tune` have in common: the default, the MLflow run, and the report."""

import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from jobs import _cli, _progress
from jobs._alone import alone
from jobs._results import Results
from jobs._run import RunFolder
from jobs._study import REPORTS, Record, StudyFolder, TrialLog
from jobs.evaluate import evaluate
from jobs.train import train
from meanet import artifact, plots, study_report
from meanet.artifact import TrainedModel
from meanet.config import Recipe
from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.judge import Study
from meanet.phases import phase_keys
from meanet.proposals import Plan, SearcherName
from meanet.replay import Outcome, replay
from meanet.routing import Policy
from meanet.storage import check_writable, writable_directory, write_parquet, write_text
from meanet.study import Trial, read_front, read_trials, trial_id, write_trial
from meanet.study_report import Chosen, Facts
from meanet.tracking import Tracker
from meanet.tuning import Ended

Default = tuple[TrainedModel | None, ExitsTable]
"""The default's model, where there is one, and its recorded exits."""


@dataclass(frozen=True)
class Flags:
    """Try configurations of a space in parallel, and keep the model of the best operating point."""

    space: tyro.conf.Suppress[str]
    recipe: _cli.RecipeFlags
    """The recipe's own fields: the default configuration."""
    trials: int = 16
    """Configurations to try."""
    searcher: SearcherName = "optuna"
    """optuna: multi-objective TPE on accuracy and joules; random: for comparison."""
    policies: Literal["early_gates", "one_gate", "all_gates", "paper"] = "early_gates"
    """What a trial's front compares, a function of tune_spaces.policies (not of the space `gates`)."""
    output: Path | None = None
    """The study's folder, which every node can write; outputs/tune-SPACE-RECIPE if not given."""
    results: str | None = None
    """Where results go, s3:// or a path: trials and the default as they finish, from where an interrupted study goes on
    on any machine; model, exits, reports and Tune's record when it is over."""
    base: Path | None = None
    """A run's folder (jobs.train, jobs.evaluate) whose main block and cloud network the trials share; trained first if
    not given."""
    exits: str | None = None
    """Of the space `gates`: an exits table to search; the default's if not given."""
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

    @property
    def root(self) -> Path:
        """The study's folder."""
        return (self.output or Path("outputs") / f"tune-{self.space}-{self.recipe.name}").absolute()


@dataclass
class StudyJob(ABC):
    """A study; what kind of trials it has is its subclass's."""

    flags: Flags
    tracker: Tracker
    failed: dict[str, str] = field(default_factory=dict)
    """Trial -> what it failed with."""

    @property
    def recipe(self) -> Recipe:
        """The default configuration."""
        return self.flags.recipe

    @property
    def root(self) -> Path:
        """The study's folder."""
        return self.flags.root

    @abstractmethod
    def data_digest(self) -> str:
        """Of what the study is about."""

    @abstractmethod
    def default(self) -> Default:
        """The default configuration, trained and evaluated."""

    @abstractmethod
    def study(self, table: ExitsTable) -> Study:
        """What trials share."""

    @abstractmethod
    def run_trials(self, study: Study) -> list[Ended]:
        """Run what is left."""

    @abstractmethod
    def of_trial(
        self, study: Study, best: Trial, default: Default
    ) -> tuple[TrainedModel | None, ExitsTable, dict[str, Any]]:
        """A trial's model, its exits, and its operating point."""

    @abstractmethod
    def to_beat(self, study: Study, table: ExitsTable, trials: list[Trial]) -> tuple[str, Any, Policy]:
        """The front that the study is compared with: its name and points, and its operating point."""

    def all_stages(self) -> dict[str, Any]:
        """Run what is left, on the connected cluster; returns the report."""
        if self.flags.results:
            check_writable(self.flags.results)  # before an hour of trials
        results = Results(self.root, self.flags.results)
        results.fetch()
        self.folder = StudyFolder.begin(self.root, self._record())
        self._start_run()
        with self.folder.stage("base"):
            default = self.default()
        study = self.study(default[1])
        log = TrialLog(self.folder, self.tracker)
        if not self.folder.done("trials"):
            with self.folder.stage("trials"), log.following(), results.following():
                self._keep(study, self.run_trials(study))
        with self.folder.stage("report"):
            report = self._report(study, default, log)
            results.copy_all()
        results.close()
        return report

    def _record(self) -> Record:
        plan = {name: getattr(self.flags, name) for name in ("trials", "searcher", "policies", "workers_per_trial")}
        return Record(
            id="",
            space=self.flags.space,
            recipe=self.recipe.name,
            digest=self.recipe.digest(),
            data_digest=self.data_digest(),
            tracking_uri=self.tracker.uri,
            plan={**plan, "base": str(self.flags.base.absolute()) if self.flags.base else None},
        )

    def _start_run(self) -> None:
        record = self.folder.record
        if record.mlflow_run is not None and self.tracker.resume_run(record.mlflow_run):
            for name in set(record.trial_runs) - {*record.logged}:
                self.tracker.resume_run(record.trial_runs[name])
            return
        tags = {"recipe": record.recipe, "space": record.space, "commit": _cli.commit(), "study": record.id}
        name = f"tune-{record.space}-{record.recipe}-{record.id}"
        record.mlflow_run = self.tracker.start_run(name, {**self.recipe.to_dict(), "study": record.plan}, tags)
        record.trial_runs, record.logged = {}, []
        self.folder.save()

    @property
    def mlflow_run(self) -> str:
        """Of the study."""
        run = self.folder.record.mlflow_run
        assert run is not None, "a study has a run"
        return run

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
                front = read_front(study.progress(name).with_suffix(".front.json"))
                write_trial(Trial(name, one.params, "stopped", one.measured, front), study.trials / name)
        if not finished:
            raise UserError(
                f"no trial of the study finished: {next(iter(self.failed.values()), 'none was started')}; mend that, "
                "and give the same command again"
            )

    # The report

    def _report(self, study: Study, default: Default, log: TrialLog) -> dict[str, Any]:
        trials = read_trials(study.trials)
        log.complete(trials)
        best = study_report.best_trial(trials, self.recipe.operating_point)
        model, table, point = self.of_trial(study, best, default)
        self._write(model, table, point)
        name, front, policy = self.to_beat(study, default[1], trials)
        chosen = Chosen(best, point, on_test(table, Policy.from_dict(point)), on_test(default[1], policy))
        facts = self._facts(study, name, front)
        report = study_report.build(trials, facts, chosen)
        study_report.write(self.root, report, trials, facts)
        self._log(report, trials, facts)
        return report

    def _write(self, model: TrainedModel | None, table: ExitsTable, point: dict[str, Any]) -> None:
        """The chosen trial's model, exits and operating point into the study's folder, for `jobs.register`."""
        shutil.rmtree(self.root / "model", ignore_errors=True)
        if model is not None:
            artifact.save(model.with_operating_point(point), self.root / "model")
        write_parquet(table.table, self.root / "exits.parquet")
        write_text(json.dumps(point, indent=2), self.root / "operating_point.json")

    def _facts(self, study: Study, name: str, front: Any) -> Facts:
        names = (*REPORTS, "exits.parquet", "operating_point.json", "model")
        return Facts(
            space=study.space,
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            searcher=self.flags.searcher,
            commit=_cli.commit(),
            reference=study.reference,
            default=tuple(front),
            default_name=name,
            failed=self.failed,
            seconds=dict(self.folder.record.seconds),
            files={name: str(self.root / name) for name in names if (self.root / name).exists() or name in REPORTS},
        )

    def _log(self, report: dict[str, Any], trials: list[Trial], facts: Facts) -> None:
        run = self.mlflow_run
        by_trial = enumerate(report["hypervolume"]["by_trial"], 1)
        self.tracker.log_steps(run, [(step, {"hypervolume": value}) for step, value in by_trial])
        for name, figure in study_report.figures(trials, facts).items():
            self.tracker.log_file(run, plots.save_png(figure, self.root / f"{name}.png"), "plots")
        for name in (*REPORTS, "operating_point.json"):
            self.tracker.log_file(run, self.root / name)
        self.tracker.log_text(run, json.dumps(report["union_front"], indent=1), "union_front.json")
        self.tracker.end_run(run)

    # The default

    def trained_default(self, splits: Splits) -> tuple[TrainedModel, ExitsTable]:
        """The run's folder that `--base` gives, or the default trained as `jobs.train` and `jobs.evaluate` do."""
        self.tracker.log_dataset(self.mlflow_run, splits.table)
        model, table = self._given(self.flags.base, splits) if self.flags.base else self._train_default(splits)
        table.energy = self.recipe.energy  # a given run may have been evaluated under other profiles
        return model, table

    def _given(self, base: Path, splits: Splits) -> tuple[TrainedModel, ExitsTable]:
        model = artifact.load(base / "model")
        check_base(base, model, self.recipe, splits)
        return model, ExitsTable.read(base / "exits.parquet")

    def _train_default(self, splits: Splits) -> tuple[TrainedModel, ExitsTable]:
        root = self.root / "base"
        with alone(writable_directory(root)):  # it is a run's folder: jobs.train may be told to work there
            return self._trained_in(root, splits)

    def _trained_in(self, root: Path, splits: Splits) -> tuple[TrainedModel, ExitsTable]:
        digest = splits.table.digest
        if _evaluated(root, self.recipe, digest):
            return artifact.load(root / "model"), ExitsTable.read(root / "exits.parquet")
        run = RunFolder.begin(root, self.recipe, self.tracker.uri, digest, goal="evaluate")
        if run.record.mlflow_run is None:
            tags = {"recipe": self.recipe.name, "space": self.flags.space}
            run.record.mlflow_run = self.tracker.start_run("default", self.recipe.to_dict(), tags, self.mlflow_run)
        if not run.done("train"):
            with run.stage("train", "  the default: train"):
                train(run, self.recipe, self.tracker, self.flags.workers, None)
        with run.stage("evaluate", "  the default: evaluate"):
            model = artifact.load(run.model)
            table = evaluate(run, model)
        assert run.record.mlflow_run is not None, "training has a run"
        self.tracker.end_run(run.record.mlflow_run)
        return model, table


def check_base(base: Path, model: TrainedModel, recipe: Recipe, splits: Splits) -> None:
    """Whether a run's main block and cloud network are what a recipe would train on these images.

    Raises:
        UserError: they are not.
    """
    digest, num_classes = splits.table.digest, splits.table.num_classes
    if model.data_digest != digest:
        raise UserError(f"--base {base} was trained on other images than {recipe.data.source!r}: train it anew")
    ours, theirs = phase_keys(recipe, digest, num_classes), phase_keys(model.recipe, digest, num_classes)
    other = [phase for phase in ("main", "cloud") if ours[phase] != theirs[phase]]
    if other:
        raise UserError(
            f"--base {base} does not fit {recipe.name!r} with these flags: its {' and '.join(other)} phase has other "
            "settings; give it the same flags, or leave --base out to train the default first"
        )


def _evaluated(root: Path, recipe: Recipe, data_digest: str) -> bool:
    """Whether a run's folder holds this recipe's model and its exits."""
    try:
        record = json.loads((root / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = (record.get("digest"), record.get("data_digest")) == (recipe.digest(), data_digest)
    return same and "evaluate" in record.get("seconds", {})


def on_test(table: ExitsTable, policy: Policy) -> Outcome:
    """A policy's figures on the test split."""
    return replay(table.exits("test"), table.costs, policy)
