"""What all trials of a study share, and how a trial's networks become a front on validation.

The frozen main block's answers are computed once a main block, the cloud's are the default's: a front costs a pass of
the extension path over the images of which the main exit predicts a hard class.

Shape letters: N validation samples, C classes, H hard classes, F channels of the main block's features. No Ray.
"""

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meanet.config import Recipe
from meanet.data import Splits
from meanet.energy import CostModel, cost_model
from meanet.fronts import pareto_front
from meanet.models import bytes_moved_of, macs_of
from meanet.operating_point import PolicySpace, Swept, policy_of, sweep
from meanet.phases import PhaseStore
from meanet.preprocessing import Preprocessing
from meanet.replay import Exits, replay
from meanet.routing import GATES, Policy, read_main
from meanet.study import FrontPoint, Reference, Space
from meanet.training import Networks, preprocessing_of

_FEATURES_BYTES = 2**30
"""Features of the main block on validation are kept up to this size, and computed again at every rung above it."""


@dataclass(frozen=True)
class Study:
    """What all trials of a study share; it travels to them."""

    root: str
    """The study's folder, which every node can write."""
    recipe: Recipe
    """The default."""
    space: Space
    """What varies."""
    policies: PolicySpace
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
        policies = self.study.policies
        return sweep(
            exits,
            self.costs,
            policies.gates,
            policies.sizes(len(exits.hard_classes)),
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
