"""Search what needs training: `python -m jobs.tune class_split digits` -> a front over trials, and a model to register.

Joins the cluster in RAY_ADDRESS or starts a local one. Run again after an interruption, it goes on where it stopped:
no finished trial runs twice. docs/tuning.md has the spaces and what comes out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import _cli
from jobs._alone import alone
from jobs._gates import GatesStudy
from jobs._run import tracked
from jobs._study_job import Default, Flags, StudyJob, check_base
from jobs.sweep import sweep
from jobs.train import check_cluster, load_splits, object_store_bytes
from meanet import artifact, cluster, tuning
from meanet.artifact import TrainedModel
from meanet.config import Recipe
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable, exits_table
from meanet.judge import Study, reference_of
from meanet.operating_point import Search
from meanet.routing import Policy
from meanet.stopping import leave_after
from meanet.storage import writable_directory
from meanet.study import Space, Trial, trial_id
from meanet.tracking import Tracker
from meanet.training import check
from meanet.trial import keep_base
from meanet.tuning import Ended
from tune_spaces import policies
from tune_spaces.blocks import blocks
from tune_spaces.class_split import class_split
from tune_spaces.joint import joint
from tune_spaces.training import training

SPACES: dict[str, Callable[[Recipe, int], Space]] = {
    space.__name__: space for space in (class_split, blocks, training, joint)
}
"""Those whose trials train; `gates` replays recorded exits."""


@dataclass
class TrainedStudy(StudyJob):
    """A study whose trials train what their parameters change."""

    def __post_init__(self) -> None:
        if self.flags.exits is not None:
            raise UserError(f"--exits {self.flags.exits} is for the space gates: {self.flags.space} trains; drop it")
        self.splits = load_splits(self.recipe)
        check(self.recipe, self.splits)  # find mistakes before an earlier study is replaced
        self.space = SPACES[self.flags.space](self.recipe, self.splits.table.num_classes)
        if self.flags.base is not None:
            check_base(self.flags.base, artifact.load(self.flags.base / "model"), self.recipe, self.splits)
            ExitsTable.read(self.flags.base / "exits.parquet")

    def data_digest(self) -> str:
        """Of the images."""
        return self.splits.table.digest

    def default(self) -> Default:
        """Trained and evaluated; its phases are the trials' to share."""
        model, table = self.trained_default(self.splits)
        keep_base(self.root, model, self.splits.table.num_classes)
        return model, table

    def study(self, table: ExitsTable) -> Study:
        """With the default's main block and cloud."""
        exits = table.exits("validation")
        return Study(
            root=str(self.root),
            recipe=self.recipe,
            space=self.space,
            policies=policies.SPACES[self.flags.policies](),
            reference=reference_of(exits, table.costs),
            exits=exits,
            run=self.mlflow_run,
        )

    def run_trials(self, study: Study) -> list[Ended]:
        """On Ray Tune, each with Ray Train inside."""
        return tuning.run_trials(study, self.splits, self.flags.plan, self.folder.record.id)

    def of_trial(self, study: Study, best: Trial, default: Default) -> tuple[TrainedModel, ExitsTable, dict[str, Any]]:
        """Every network of the trial's model once over validation and test."""
        model = artifact.load(study.trials / best.id / "model")
        table = ExitsTable(exits_table(model, self.splits))
        return model, table, self._search(table).chosen

    def _search(self, table: ExitsTable) -> Search:
        return sweep(table, self.flags.policies, self.recipe.operating_point, self.mlflow_run)

    def to_beat(self, study: Study, table: ExitsTable, trials: list[Trial]) -> tuple[str, Any, Policy]:
        """The default trial's front."""
        default = next((trial for trial in trials if trial.id == trial_id(study.space.first[0])), None)
        point = Policy.from_dict(self._search(table).chosen)
        if default is None or not default.front:
            return "the default's front (its trial failed)", (), point
        return f"the default's front (trial {default.id})", default.front, point


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("tune", Flags, before={"space": (*SPACES, "gates")})
    plan = flags.plan
    make = GatesStudy if flags.space == "gates" else TrainedStudy
    study = make(flags, Tracker(environment.tracking_uri))
    store = object_store_bytes(study.splits) if study.splits else cluster.OBJECT_STORE_BYTES
    with alone(writable_directory(study.root)), cluster.ray_cluster(environment.ray_address, store):
        if study.splits:
            check_cluster(study.splits, flags.workers, None, study.root)
        tuning.concurrent_trials(plan)
        with tracked(study.tracker):
            report = study.all_stages()
    if flags.json:
        print(json.dumps(report))
        return
    print(f"\n{report['summary']}\n\nreport:  {study.root / 'report.html'}  (and report.json, union_front.csv)")
    if "model" in report["files"]:
        print(f"next:    python -m jobs.register {study.root}   (another trial's model: --trial ID)")


if __name__ == "__main__":
    leave_after(main)
