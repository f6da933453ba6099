"""The space `gates`: a threshold a class, sampled over a recorded exits table. Nothing is trained but the default."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs._study_job import Default, StudyJob, check_base
from jobs.train import load_splits
from meanet import artifact, tuning
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.judge import Study, reference_of
from meanet.operating_point import PolicySpace
from meanet.per_class import Evaluation, ExactFront, exact_front, starts
from meanet.routing import MEASURES, Policy
from meanet.study import Trial
from meanet.training import check
from meanet.tuning import Ended
from tune_spaces.gates import gates


@dataclass
class GatesStudy(StudyJob):
    """A study of policies over one model's exits."""

    def __post_init__(self) -> None:
        self.splits: Splits | None = None
        self.table: ExitsTable | None = None
        if self.flags.exits is None:
            self.splits = load_splits(self.recipe)
            check(self.recipe, self.splits)
            if self.flags.base is not None:
                check_base(self.flags.base, artifact.load(self.flags.base / "model"), self.recipe, self.splits)
            return
        if self.flags.base is not None:
            raise UserError("--exits and --base: a table's policies are searched as they are; drop one of the two")
        self.table = ExitsTable.read(self.flags.exits)
        self.table.energy = self.recipe.energy

    def data_digest(self) -> str:
        """Of the images, or of the table."""
        if self.splits is not None:
            return self.splits.table.digest
        assert self.table is not None, "one of the two is there"
        exits = self.table.exits("validation")
        hasher = hashlib.sha256(exits.main_logits.tobytes())
        for array in (exits.extension_logits, exits.cloud_pred, exits.labels):
            hasher.update(array.tobytes())
        return hasher.hexdigest()

    def default(self) -> Default:
        """The table, and the model beside it if it is there."""
        if self.splits is not None:
            model, table = self.trained_default(self.splits)
            return model, table
        assert self.table is not None, "one of the two is there"
        assert self.flags.exits is not None, "it names the table"
        beside = Path(self.flags.exits).parent / "model"
        return (artifact.load(beside) if beside.exists() else None), self.table

    def study(self, table: ExitsTable) -> Study:
        """From points of the exact front on."""
        exits, costs = table.exits("validation"), table.costs
        reference = reference_of(exits, costs)
        self._costs, self._exits, self._reference = costs, exits, reference
        first = starts(exits, self._exact, max(1, self.flags.trials // 2))
        return Study(
            root=str(self.root),
            recipe=self.recipe,
            space=gates(exits.num_classes, len(exits.hard_classes), first),
            policies=PolicySpace(MEASURES),
            reference=reference,
            exits=exits,
            run=self.mlflow_run,
        )

    @cached_property
    def _exact(self) -> ExactFront:
        return exact_front(self._exits, self._costs, self.recipe.operating_point, self._reference)

    def run_trials(self, study: Study) -> list[Ended]:
        """Plain functions on Ray Tune."""
        evaluation = Evaluation(
            study.exits,
            self._costs,
            self.recipe.energy,
            self.recipe.operating_point,
            study.reference,
            str(study.trials),
            study.run,
        )
        return tuning.run_functions(evaluation, study, self.flags.plan, self.folder.record.id)

    def of_trial(
        self, study: Study, best: Trial, default: Default
    ) -> tuple[TrainedModel | None, ExitsTable, dict[str, Any]]:
        """The same model under the trial's policy."""
        assert best.operating_point is not None, "only such a trial is chosen"
        return *default, best.operating_point

    def to_beat(self, study: Study, table: ExitsTable, trials: list[Trial]) -> tuple[str, Any, Policy]:
        """Every policy of one threshold."""
        return "the exact front of one threshold for all classes", self._exact.front, self._exact.chosen
