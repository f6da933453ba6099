"""What a study tries next: Optuna's proposals for two objectives, each configuration once."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from meanet.errors import UserError
from meanet.study import Choice, Domain, FloatRange, IntRange, Space, Value, read_started, read_trials, trial_id

SearcherName = Literal["optuna", "random"]
METRICS, MODES = ["accuracy", "joules"], ["max", "min"]
_DRAWS = 20


@dataclass(frozen=True)
class Plan:
    """How a study is run."""

    trials: int = 16
    """Configurations to try."""
    searcher: SearcherName = "optuna"
    """optuna: multi-objective TPE; random: for comparison."""
    concurrent: int | None = None
    """Trials at a time; as many as the cluster has CPUs for if None."""
    workers: int = 0
    """Ray Train workers of a trial; 0 = in the trial's own process, on one CPU."""

    def __post_init__(self) -> None:
        for name, value, low in (("trials", self.trials, 1), ("workers-per-trial", self.workers, 0)):
            if value < low:
                raise UserError(f"--{name} is {value}: it must be {low} or more")
        if self.concurrent is not None and self.concurrent < 1:
            raise UserError(f"--concurrent is {self.concurrent}: it must be 1 or more")


def distribution(domain: Domain) -> Any:
    """A domain in Optuna's words."""
    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(list(domain.values))
    if isinstance(domain, IntRange):
        return optuna.distributions.IntDistribution(domain.low, domain.high)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def draw(domain: Domain, generator: np.random.Generator) -> Value:
    """A value at random."""
    if isinstance(domain, Choice):
        return domain.values[int(generator.integers(len(domain.values)))]
    if isinstance(domain, IntRange):
        return int(generator.integers(domain.low, domain.high + 1))
    if isinstance(domain, FloatRange) and domain.log:
        return float(np.exp(generator.uniform(np.log(domain.low), np.log(domain.high))))
    return float(generator.uniform(domain.low, domain.high))


def _sampler(plan: Plan, seed: int) -> Any:
    if plan.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=min(10, max(3, plan.trials // 4))
        )


class StudySearch(OptunaSearch):
    """Optuna's proposals for two objectives, each configuration once.

    Restored, it proposes first what finished without having been noted: Tune's record may be a moment older than the
    trials' folders.
    """

    def __init__(self, space: Space, seed: int, plan: Plan, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            {name: distribution(domain) for name, domain in space.parameters.items()},
            metric=list(METRICS),
            mode=list(MODES),
            points_to_evaluate=[dict(params) for params in space.first],
            sampler=_sampler(plan, seed),
        )
        self._domains = dict(space.parameters)
        self._generator = np.random.default_rng(seed)
        self._folder = folder
        self._seen: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """A configuration that was not proposed before; the end, where there is none left."""
        for attempt in range(10 * _DRAWS):
            if attempt >= _DRAWS:  # the sampler has settled on what is known
                point = {name: draw(domain, self._generator) for name, domain in self._domains.items()}
                self._study.enqueue_trial(point)
            params = super().suggest(trial_id)
            assert params is not None, "Optuna always has a proposal"
            name = _name(params)
            if name not in self._seen:
                self._seen.add(name)
                return params
            self._study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
        finished: Any = Searcher.FINISHED  # Tune's own way to say so
        return finished  # type: ignore[no-any-return]

    @property
    def _study(self) -> Any:
        return self._ot_study

    def restore(self, checkpoint_path: str) -> None:
        """Go on from Tune's record and the folders of finished trials."""
        super().restore(checkpoint_path)
        self.adopt()

    def adopt(self) -> None:
        """Propose first what finished without having been noted, then what was cut off."""
        known = [trial.params for trial in read_trials(self._folder / "trials")]
        known += read_started(self._folder / "progress")
        for params in {trial_id(params): params for params in known}.values():
            if trial_id(params) not in self._seen:
                self._study.enqueue_trial(params)


def _name(params: dict[str, Any]) -> str:
    return trial_id(params)
