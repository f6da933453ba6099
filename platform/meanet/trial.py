"""One trial of a study: train what its parameters change, show the front on validation at every rung, leave a model.

    trials/ID/trial.json   parameters, front, operating point; the folder appears whole
    trials/ID/model/       a model as `meanet.artifact` has it (the cloud's weights are one file for all trials)
    progress/ID.jsonl      what the driver shows while the trial runs

Shape letters: N validation samples, C classes, H hard classes. No Ray: what surrounds a trial hands in a `Worker`.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meanet import artifact
from meanet.config import Gate, Recipe
from meanet.data import Splits
from meanet.energy import CostModel, cost_model
from meanet.errors import UserError
from meanet.fronts import choose, pareto_front
from meanet.loop import Epoch, State, Worker
from meanet.models import bytes_moved_of, macs_of
from meanet.operating_point import Swept, describe, policy_of, sweep
from meanet.phases import PhaseStore, Trained, phase_keys
from meanet.preprocessing import Preprocessing
from meanet.replay import Exits, replay
from meanet.routing import GATES, Policy, read_main
from meanet.study import (
    TRIAL,
    FrontPoint,
    Measured,
    Params,
    Reference,
    Space,
    Trial,
    measure,
    read_trial,
    trial_id,
    write_trial,
)
from meanet.training import MakeFeed, Networks, Trainer, build_networks, preprocessing_of

RUNGS = 4
"""How often a trial shows its front, the last time at its end."""
_FEATURES_BYTES = 2**30
"""Features of the main block on validation are kept up to this size, and computed again at every rung above it."""
Show = Callable[[Measured], None]


@dataclass(frozen=True)
class Policies:
    """What the exact sweep of a trial's exits compares."""

    gates: tuple[Gate, ...]
    """Measures of complexity, and `two_gate`."""
    smallest_split: int = 0
    """Fewest hard classes in use; the most are the trained H."""
    scaled: bool = False
    """Each gate with temperature-scaled logits, too."""


@dataclass(frozen=True)
class Study:
    """What all trials of a study share; it travels to them."""

    root: str
    """The study's folder, which every node can write."""
    recipe: Recipe
    """The default."""
    space: Space
    """What varies."""
    policies: Policies
    """What the exact sweep compares."""
    reference: Reference
    """The corner from which fronts are measured."""
    exits: Exits
    """The default's exits on validation; the cloud's answers and the sizes of uploads are every trial's."""
    run: str | None = None
    """MLflow run of the study."""

    @property
    def trials(self) -> Path:
        """Where finished trials lie."""
        return Path(self.root) / "trials"

    @property
    def store(self) -> PhaseStore:
        """What phases have trained."""
        return PhaseStore(Path(self.root) / "phases")

    def progress(self, name: str) -> Path:
        """What a trial says while it runs."""
        return Path(self.root) / "progress" / f"{name}.jsonl"


def reference_of(exits: Exits, costs: CostModel) -> Reference:
    """The default's main exit alone, and every image sent after the main block has run."""
    joules = costs.main_joules + float(np.mean(costs.upload_joules(exits.upload_bytes)))
    return Reference(replay(exits, costs, Policy()).accuracy, joules)


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
        _share(part / "model" / artifact.CLOUD, self.study.store.root / f"shared-{self.keys['cloud']}.safetensors")
        write_trial(trial, part)
        _replace(part, self.study.trials / self.id)
        self._say({"event": "end", "state": trial.state, **asdict(trial.measured), "seconds": trial.seconds})

    def rung(self, number: int, epoch: int, measured: Measured) -> None:
        """Say how a trial stands."""
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
        self._run.rung(self._at.index(row.epoch) + 1, row.epoch, measured)
        self._show(measured)


def front_points(swept: Swept) -> list[FrontPoint]:
    """The front of what was compared, as plain records, cheapest first."""
    front = pareto_front(swept.points)
    return [
        FrontPoint(
            accuracy=float(front.accuracy[row]),
            joules=float(front.joules[row]),
            cloud_share=float(front.cloud_share[row]),
            gate=GATES[front.gate[row]],
            thresholds=policy_of(front, row, ()).thresholds,
            scaled=bool(front.scaled[row]),
            num_hard_classes=int(front.num_hard_classes[row]),
        )
        for row in range(len(front))
    ]


class Judge:
    """Replays a path over the frozen main block and the cloud's recorded answers, on validation."""

    def __init__(self, study: Study, recipe: Recipe, splits: Splits, networks: Networks, keys: dict[str, str]) -> None:
        self.study, self.splits, self.networks = study, splits, networks
        self.preprocessing: Preprocessing = preprocessing_of(recipe, splits)
        shape = self.preprocessing.image_shape
        macs = macs_of(networks.meanet.cpu(), networks.cloud.cpu(), shape)
        self.costs = cost_model(recipe.energy, macs, bytes_moved_of(networks.meanet, shape))
        self._folder = study.store.folder("main", keys["main"])
        self._answers()

    def sweep(self, exits: Exits) -> Swept:
        """Every policy of the study's."""
        policies, trained = self.study.policies, len(exits.hard_classes)
        return sweep(
            exits,
            self.costs,
            policies.gates,
            range(min(policies.smallest_split, trained), trained + 1),
            scaled=policies.scaled,
            confidence=self.study.recipe.operating_point.confidence,
        )

    @torch.inference_mode()
    def exits(self, path: nn.Module, hard_classes: tuple[int, ...]) -> Exits:
        """All recorded exits under this path; it runs where the main exit predicts a hard class, as the rule does."""
        pred = read_main(self._logits, Policy()).pred
        asked = np.flatnonzero(np.isin(pred, hard_classes))
        logits = np.zeros((len(pred), len(hard_classes)), dtype=np.float32)
        was_training = path.training
        path.eval()
        for start in range(0, len(asked), self._batch):
            part = asked[start : start + self._batch]
            images, features = self._inputs(part)
            logits[part] = path(images, features).float().cpu().numpy()
        path.train(was_training)
        return replace(
            self.study.exits, main_logits=self._logits, extension_logits=logits, hard_classes=tuple(hard_classes)
        )

    @property
    def _batch(self) -> int:
        return self.splits.table.evaluation_batch

    def _images(self, part: NDArray[np.int64]) -> torch.Tensor:
        rows = self.splits.validation[part]
        (pixels,) = self.splits.table.batches(rows, max(1, len(rows)))
        device = next(self.networks.meanet.path.parameters()).device
        return torch.from_numpy(self.preprocessing.normalise(pixels)).to(device)

    def _inputs(self, part: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and main features (B, F, h, w) of some validation samples."""
        images = self._images(part)
        if self._features is None:
            return images, self._main(images)[0]
        return images, torch.from_numpy(np.ascontiguousarray(self._features[part])).to(images.device)

    def _main(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.networks.meanet.main.to(images.device).eval()(images)
        return found

    @torch.inference_mode()
    def _answers(self) -> None:
        """What the frozen main block says of validation: computed once a main block, then shared by all trials."""
        logits_at, features_at = (self._folder / f"validation-{name}.npy" for name in ("logits", "features"))
        if not logits_at.exists():
            parts = np.array_split(
                np.arange(len(self.splits.validation)), max(1, math.ceil(len(self.splits.validation) / self._batch))
            )
            found = [self._main(self._images(part)) for part in parts]
            features = np.concatenate([one[0].float().cpu().numpy() for one in found])
            if features.nbytes <= _FEATURES_BYTES:
                _save_array(features, features_at)
            _save_array(np.concatenate([one[1].float().cpu().numpy() for one in found]), logits_at)
        self._logits: NDArray[np.float32] = np.load(logits_at)
        self._features = np.load(features_at, mmap_mode="r") if features_at.exists() else None


def _save_array(array: NDArray[np.float32], path: Path) -> None:
    """Appears whole: two trials that compute the same are welcome to."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as part:
        np.save(part, array)
    os.replace(part.name, path)


def keep_base(study_root: Path, model: artifact.TrainedModel, num_classes: int) -> dict[str, str]:
    """Put a trained model's phases into a study's store; returns their keys."""
    store = PhaseStore(study_root / "phases")
    keys = phase_keys(model.recipe, model.data_digest, num_classes)
    facts = {"hard_classes": list(model.hard_classes), "class_precision": list(model.class_precision)}
    for phase, module in model.networks.trained.items():
        if not store.has(phase, keys[phase]):
            store.save(phase, keys[phase], Trained(module.state_dict(), facts if phase == "extension" else {}), "base")
    return keys


def check_recipe(recipe: Recipe, splits: Splits) -> None:
    """Find a configuration whose networks do not fit the images, before anything is trained.

    Raises:
        UserError: they do not.
    """
    build_networks(recipe, preprocessing_of(recipe, splits).image_shape, splits.table.num_classes)
