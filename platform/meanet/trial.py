"""One trial of a study: train what its parameters change, show the front on validation at every rung, leave a model.

    trials/ID/trial.json   parameters, front, operating point; the folder appears whole
    trials/ID/model/       a model as `meanet.artifact` has it (the cloud's weights are one file for all trials)
    progress/ID.jsonl      what the driver shows while the trial runs

No Ray: what surrounds a trial hands in a `Worker`.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meanet import artifact
from meanet.data import Splits
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.fronts import choose
from meanet.judge import Judge, Study, front_points
from meanet.loop import Epoch, State, Worker
from meanet.model_spec import CLOUD
from meanet.operating_point import Swept, describe, policy_of
from meanet.phases import PhaseStore, Trained, phase_keys
from meanet.replay import Exits, replay
from meanet.study import (
    TRIAL,
    FrontPoint,
    Measured,
    Params,
    Trial,
    measure,
    read_trial,
    trial_id,
    write_front,
    write_trial,
)
from meanet.training import MakeFeed, Trainer

RUNGS = 4
"""How often a trial shows its front, the last time at its end."""


def rungs(epochs: int, count: int = RUNGS) -> list[int]:
    """The epochs after which a trial shows its front: equal parts of the schedule, the last one included."""
    return sorted({math.ceil(epochs * part / count) for part in range(1, count + 1)})


class TrialRun:
    """One configuration of a study."""

    def __init__(
        self,
        study: Study,
        params: Params,
        splits: Splits,
        trained: tuple[str, ...] = (),
        started: float | None = None,
    ) -> None:
        """`trained`: phases that this attempt had to train; `started`: when, now if None."""
        self.study, self.params, self.splits, self._trained = study, params, splits, trained
        self.id = trial_id(params)
        self.recipe = study.space.apply(study.recipe, params)
        self.keys = phase_keys(self.recipe, splits.table.digest, splits.table.num_classes)
        self._started = time.time() if started is None else started

    @property
    def finished(self) -> Trial | None:
        """What an earlier attempt has left."""
        return read_trial(self.study.trials / self.id)

    def start(self) -> None:
        """Say that the trial runs; what an interrupted attempt said is void."""
        path = self.study.progress(self.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._say({"event": "start", "params": self.params, "pid": os.getpid()})

    def _say(self, event: dict[str, Any]) -> None:
        with self.study.progress(self.id).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": self.id, "at": time.time(), **event}) + "\n")

    # Main block

    @property
    def needs_main(self) -> bool:
        """Whether the main block must be trained first: with its lock held."""
        return not self.study.store.has("main", self.keys["main"])

    def train_main(self, worker: Worker, make_feed: MakeFeed) -> None:
        """Train the main block and keep it; every worker of a group calls this."""
        state = Trainer(self.recipe, self.splits, worker, None, make_feed).run(("main",))
        if worker.rank == 0:
            self.study.store.save("main", self.keys["main"], Trained(state.weights["main"], {}), self.id)

    # Extension and adaptive blocks

    def train_extension(self, worker: Worker, make_feed: MakeFeed, rung: "Rung") -> Trial | None:
        """Train the path over the stored main block and leave the trial; every worker of a group calls this."""
        trainer = Trainer(self.recipe, self.splits, worker, self._state(), make_feed)
        rung.judge = None if worker.rank else Judge(self.study, self.recipe, self.splits, trainer.networks, self.keys)
        state = trainer.run(("extension",))
        if worker.rank:
            return None
        facts = {"hard_classes": state.hard_classes, "class_precision": state.class_precision}
        weights = state.weights["extension"]
        self.study.store.save("extension", self.keys["extension"], Trained(weights, facts), self.id)
        return self.leave()

    def _state(self) -> State:
        """With the main block trained and nothing else."""
        main = self.study.store.load("main", self.keys["main"])
        return State(self.recipe.to_dict(), weights={"main": main.weights})

    @property
    def needs_extension(self) -> bool:
        """Whether the path must be trained."""
        return not self.study.store.has("extension", self.keys["extension"])

    def leave(self) -> Trial:
        """Front, operating point and model of the stored phases, as a folder that appears whole."""
        state = self._finished_state()
        model = artifact.from_state(state, self.splits)
        judge = Judge(self.study, self.recipe, self.splits, model.networks, self.keys)
        exits = judge.exits(model.networks.meanet.path, model.hard_classes)
        swept = judge.sweep(exits)
        front = front_points(swept)
        point = self._operating_point(swept, exits, judge.costs)
        trial = Trial(
            id=self.id,
            params=self.params,
            state="finished",
            measured=measure(front, self.study.reference),
            front=tuple(front),
            hard_classes=model.hard_classes,
            operating_point=point,
            phases=self.keys,
            trained=self._trained,
            seconds=time.time() - self._started,
            ended=time.time(),
        )
        self._write(trial, model if point is None else model.with_operating_point(point))
        return trial

    def _operating_point(self, swept: Swept, exits: Exits, costs: CostModel) -> dict[str, Any] | None:
        """What the recipe's constraint chooses; None where it cannot be kept."""
        constraint = self.recipe.operating_point
        try:
            chosen = choose(swept.points, constraint)
        except UserError:
            return None
        policy = policy_of(chosen, 0, exits.hard_classes, swept.temperatures)
        return describe(policy, replay(exits, costs, policy), constraint, self.recipe.energy, self.study.run)

    def _finished_state(self) -> State:
        kept = {phase: self.study.store.load(phase, key) for phase, key in self.keys.items()}
        return State(
            self.recipe.to_dict(),
            phase=len(kept),
            weights={phase: trained.weights for phase, trained in kept.items()},
            **kept["extension"].facts,
        )

    def _write(self, trial: Trial, model: artifact.TrainedModel) -> None:
        self.study.trials.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.study.trials))
        artifact.save(model, part / "model")
        _share(part / "model" / CLOUD, self.study.store.root / f"shared-{self.keys['cloud']}.safetensors")
        write_trial(trial, part)
        _replace(part, self.study.trials / self.id)
        self._say({"event": "end", "state": trial.state, **asdict(trial.measured), "seconds": trial.seconds})

    def rung(self, number: int, epoch: int, measured: Measured, front: Sequence[FrontPoint]) -> None:
        """Say how a trial stands; its front is what is left of it should it be stopped."""
        write_front(front, self.study.progress(self.id).with_suffix(".front.json"))
        self._say({"event": "rung", "rung": number, "epoch": epoch, **asdict(measured)})


def _replace(part: Path, folder: Path) -> None:
    """Put a whole folder in its place; what lay there without a record is void."""
    if not (folder / TRIAL).exists():
        shutil.rmtree(folder, ignore_errors=True)
    part.chmod(0o755)
    with contextlib.suppress(OSError):  # another attempt was first
        part.rename(folder)
        return
    shutil.rmtree(part, ignore_errors=True)


def _share(own: Path, shared: Path) -> None:
    """One file on disk for what all trials have in common; where the file system has no links, a copy each."""
    with contextlib.suppress(OSError):
        if not shared.exists():
            os.link(own, shared)
            return
        linked = own.with_suffix(".linked")
        os.link(shared, linked)
        os.replace(linked, own)


class Rung:
    """What happens after an epoch of the extension phase: at a rung, the front is computed, said and handed on.

    Every worker of a group is called; the first one alone judges.
    """

    def __init__(self, run: TrialRun, show: Callable[[Measured | None], None]) -> None:
        """`show` gets the figures in the first worker and None in the others."""
        self._run, self._show = run, show
        self._at = rungs(run.recipe.extension.epochs)
        self.judge: Judge | None = None

    def __call__(self, row: Epoch, state: State) -> None:
        """An epoch is over."""
        if row.phase != "extension" or row.epoch not in self._at[:-1]:
            return  # after the last epoch, the finished trial is shown
        if self.judge is None:
            self._show(None)
            return
        exits = self.judge.exits(self.judge.networks.meanet.path, tuple(state.hard_classes))
        front = front_points(self.judge.sweep(exits))
        measured = measure(front, self._run.study.reference)
        self._run.rung(self._at.index(row.epoch) + 1, row.epoch, measured, front)
        self._show(measured)


def keep_base(study_root: Path, model: artifact.TrainedModel, num_classes: int) -> dict[str, str]:
    """Put a trained model's phases into a study's store; returns their keys."""
    store = PhaseStore(study_root / "phases")
    keys = phase_keys(model.recipe, model.data_digest, num_classes)
    facts = {"hard_classes": list(model.hard_classes), "class_precision": list(model.class_precision)}
    for phase, module in model.networks.trained.items():
        if not store.has(phase, keys[phase]):
            store.save(phase, keys[phase], Trained(module.state_dict(), facts if phase == "extension" else {}), "base")
    return keys
