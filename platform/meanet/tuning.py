"""A study on Ray Tune, each trial with Ray Train inside: Optuna proposes, a scheduler stops what is hopeless.

Objectives are accuracy and joules together; the scheduler looks at the front's hypervolume. Killed and run again, a
study goes on from Tune's own record, and a trial that has left its folder is not run again.
"""

import functools
import json
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.tune.execution import class_cache
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler

from meanet.data import ImageTable, Splits
from meanet.errors import UserError
from meanet.judge import Study
from meanet.loop import SingleProcess
from meanet.proposals import Plan, StudySearch
from meanet.streaming import streaming_feed
from meanet.study import (
    Measured,
    Params,
    trial_id,
)
from meanet.training import resident_feed
from meanet.trial import RUNGS, Rung, TrialRun
from meanet.workers import RayWorker, root_cause

_GRACE, _REDUCTION = RUNGS // 2, 2
"""Half of a trial's schedule is always trained; then the better half of the trials so far goes on."""
_TRIAL_BYTES = 50 * 2**20
"""Memory that a trial reserves where its workers have the CPUs: some resource must be named, and no CPU may be."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended in Tune's eyes."""

    params: Params
    measured: Measured | None
    """Of its last report."""
    error: str | None
    """What it failed with."""


def run_trials(study: Study, splits: Splits, plan: Plan, name: str) -> list[Ended]:
    """Run what is left of a study on the connected cluster; finished trials lie in the study's folder.

    Args:
        study: what trials share.
        splits: images.
        plan: how many trials, and how.
        name: of this study below its folder's `tune/`; the same name goes on.

    Raises:
        UserError: more workers than the cluster has CPUs; Tune itself failed.
    """
    parameters = {"study": study, "splits": [ray.put(splits)], "workers": plan.workers}
    gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))  # type: ignore[no-untyped-call]
    own = {"CPU": 1.0, "GPU": float(gpus)} if plan.workers == 0 else {"memory": float(_TRIAL_BYTES)}
    scheduler = StudyScheduler(study.space.first[0])
    trainable = tune.with_resources(tune.with_parameters(_trial, **parameters), own)
    return _fit(trainable, study, plan, name, scheduler)


class StudyScheduler(AsyncHyperBandScheduler):
    """ASHA on the front's hypervolume, which never stops the default: all fronts are compared with its front."""

    def __init__(self, default: Params) -> None:
        super().__init__(
            metric="hypervolume",
            mode="max",
            max_t=RUNGS + 1,  # the last rung is the trial's own end
            grace_period=_GRACE,
            reduction_factor=_REDUCTION,
        )
        self._default = trial_id(default)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on or stop, now that a trial has shown a rung."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if trial_id(trial.config) == self._default else decision


def run_functions(evaluate: Callable[[Params], Measured], study: Study, plan: Plan, name: str) -> list[Ended]:
    """Run a study of plain functions, which leave their own folders: nothing is trained, nothing is stopped early."""
    trainable = tune.with_resources(tune.with_parameters(_evaluate, evaluate=[evaluate]), {"CPU": 1})
    return _fit(trainable, study, plan, name, None)


def _fit(trainable: Any, study: Study, plan: Plan, name: str, scheduler: AsyncHyperBandScheduler | None) -> list[Ended]:
    keep_credentials()
    storage = Path(study.root) / "tune"
    path = storage / name
    if _restorable(path):
        tuner = tune.Tuner.restore(str(path), trainable, resume_unfinished=True, restart_errored=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
        search = StudySearch(study.space, study.recipe.seed, plan, Path(study.root))
        search.adopt()
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(  # metric and mode stay out: there are two objectives
                search_alg=search,
                scheduler=scheduler,
                num_samples=plan.trials,
                max_concurrent_trials=concurrent_trials(plan),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
        )
    try:
        grid = _until_interrupted(tuner.fit)
    except (ray.exceptions.RayError, tune.TuneError) as error:
        raise UserError(f"the study could not be run: {root_cause(error)}; the same command goes on") from error
    return [_ended(grid[number]) for number in range(len(grid))]


def keep_credentials() -> None:
    """Let no AWS_ variable travel to trials: Tune would send the driver's along, and Ray's agents log what was sent."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])


def _until_interrupted(fit: Callable[[], tune.ResultGrid]) -> tune.ResultGrid:
    """Run `fit`, and raise KeyboardInterrupt where Ctrl-C ended it: Tune stops in order then, and returns as if done.

    Its handler of Ctrl-C puts ours back when it is called; that is how we know.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit()
    ours = signal.getsignal(signal.SIGINT)
    own = signal.default_int_handler if ours is None else ours
    marker = functools.partial(_call, own)
    signal.signal(signal.SIGINT, marker)
    try:
        grid = fit()
        if signal.getsignal(signal.SIGINT) is marker:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, own)
    return grid


def _call(handler: Any, number: int, frame: Any) -> None:
    """A signal's handler of its own identity."""
    if callable(handler):
        handler(number, frame)


def _restorable(path: Path) -> bool:
    """Whether Tune's own record is there and whole: it is not written in one piece.

    Without it a study begins anew, and takes over what its folder has of finished trials.
    """
    try:
        for file in path.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        for file in path.glob("*.pkl"):
            pickle.loads(file.read_bytes())  # noqa: S301  # Tune's own, which it loads itself
    except Exception:  # a pickle that was cut off fails in many ways
        return False
    return (path / "tuner.pkl").exists() and any(path.glob("experiment_state-*.json"))


def _ended(result: Any) -> Ended:
    metrics = result.metrics or {}
    names = ("accuracy", "joules", "hypervolume")
    measured = Measured(*(float(metrics[name]) for name in names)) if all(name in metrics for name in names) else None
    return Ended(dict(result.config), measured, root_cause(result.error) if result.error else None)


def concurrent_trials(plan: Plan) -> int:
    """Trials at a time on the connected cluster.

    Raises:
        UserError: a trial wants more workers than there are CPUs.
    """
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    if plan.workers > cpus:
        raise UserError(f"--workers-per-trial is {plan.workers} and the cluster has {cpus} CPUs: lower it or add nodes")
    fitting = max(1, cpus // max(1, plan.workers))
    return min(fitting, plan.trials, plan.concurrent or fitting)


# Inside a trial


def _evaluate(params: Params, evaluate: list[Callable[[Params], Measured]]) -> None:
    """A trial that is a plain function."""
    tune.report(asdict(evaluate[0](dict(params))))


def _trial(params: Params, study: Study, splits: list[Any], workers: int) -> None:
    """A trial that trains: main block under a lock if nobody has yet, then its extension, reporting every rung.

    The extension's lock is for what is left of a killed study: processes that live on for a moment.
    """
    torch.set_num_threads(1)
    params, trained = dict(params), []
    run = TrialRun(study, params, ray.get(splits[0]))
    train = functools.partial(_train, study, params, splits, workers=workers, started=time.time())
    with study.store.lock("main", run.keys["main"]):
        if run.needs_main:
            run.start()
            train("main", trained=())
            trained.append("main")
    with study.store.lock("extension", run.keys["extension"]):
        trial = run.finished
        if trial is None:
            run.start()
            if run.needs_extension:
                train("extension", trained=(*trained, "extension"))
                return
            trial = run.leave()
    tune.report(asdict(trial.measured))


def _train(
    study: Study,
    params: Params,
    splits: list[Any],
    phase: str,
    *,
    workers: int,
    started: float,
    trained: tuple[str, ...],
) -> None:
    """One phase on Ray Train: in this process, or in a worker group of its own."""

    def loop() -> None:
        run = TrialRun(study, params, ray.get(splits[0]), trained, started)
        feed = resident_feed if isinstance(run.splits.table, ImageTable) else streaming_feed
        show = _show if workers == 0 else _show_from_group
        rung = Rung(run, show)
        worker = SingleProcess(rung, get_device()) if workers == 0 else RayWorker(rung)
        if phase == "main":
            run.train_main(worker, feed)
            return
        trial = run.train_extension(worker, feed, rung)
        show(trial.measured if trial else None)

    group: list[Any] = [] if workers == 0 else [TuneReportCallback()]  # type: ignore[no-untyped-call]
    gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=0 < workers <= gpus),
        run_config=RunConfig(
            name=f"{trial_id(params)}-{phase}", storage_path=str(Path(study.root) / "tune" / "train"), callbacks=group
        ),
    ).fit()


def _show(measured: Measured | None) -> None:
    """In a trial's own process Ray Train refuses its `report`: Tune's is the one to call."""
    assert measured is not None, "the only worker judges"
    tune.report(asdict(measured))


def _show_from_group(measured: Measured | None) -> None:
    """Every worker reports; the first one's figures reach Tune through its callback."""
    ray.train.report(asdict(measured) if measured else {})
