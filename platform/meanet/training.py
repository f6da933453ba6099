"""MEANet's phases (section IV), in order, resumable after any epoch.

    main on all classes -> class split by validation precision -> extension + adaptive on hard classes only, the main
    block frozen and in evaluation mode -> the cloud network on all classes

Shape letters: B batch, C classes, H hard classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from meanet.class_split import class_precision, hardest_classes
from meanet.config import PhaseConfig, Recipe
from meanet.data import Splits
from meanet.energy import Macs, cost_model
from meanet.feeds import ResidentFeed
from meanet.loop import PHASES, Phase, PhaseRunner, State, Worker
from meanet.models import CloudNet, MEANet
from meanet.preprocessing import Preprocessing
from meanet.routing import Ints


@dataclass(frozen=True)
class Networks:
    """The modules under training."""

    meanet: MEANet
    """Edge."""
    cloud: CloudNet
    """Cloud."""

    @property
    def trained(self) -> dict[str, nn.Module]:
        """What each phase trains, by the phase's name."""
        return {"main": self.meanet.main, "extension": self.meanet.path, "cloud": self.cloud}


def build_networks(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> Networks:
    """Freshly initialised networks for (C, H, W) images; the recipe's seed fixes every weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        meanet = MEANet(recipe.model, image_shape, num_classes, recipe.split.num_hard_classes)
        return Networks(meanet, CloudNet(recipe.model, image_shape, num_classes))


def check(recipe: Recipe, splits: Splits) -> None:
    """Find a user's mistakes before a worker starts.

    Raises:
        UserError: the class split asks for no class or for all of them; networks that do not fit the images; profiles
            that do not exist.
    """
    recipe.split.check(splits.table.num_classes)
    build_networks(recipe, Preprocessing.of(splits.table.take(splits.train)).image_shape, splits.table.num_classes)
    cost_model(recipe.energy, Macs(0, 0, 0, 0))


class Trainer:
    """All phases of one recipe over one data set; `check` them first."""

    def __init__(self, recipe: Recipe, splits: Splits, worker: Worker, state: State | None = None) -> None:
        table = splits.table
        self.recipe, self.splits, self.worker = recipe, splits, worker
        self.state = state or State(recipe.to_dict())
        self.preprocessing = Preprocessing.of(table.take(splits.train))
        self.networks = build_networks(recipe, self.preprocessing.image_shape, table.num_classes)
        for name, weights in self.state.weights.items():
            self.networks.trained[name].load_state_dict(weights)
        self.images = torch.from_numpy(self.preprocessing.normalise(table.images))
        self.labels = torch.from_numpy(table.labels)

    def run(self) -> State:
        """Train what is left; returns the finished state."""
        feed = ResidentFeed(self.images, self.recipe.data.crop_padding, self.recipe.data.flip)
        while not self.state.finished:
            name = PHASES[self.state.phase]
            phase = {"main": self._main, "extension": self._extension, "cloud": self._cloud}[name]()
            PhaseRunner(phase, feed, self.worker, self.state, self.recipe.seed).run()
        return self.state

    def _main(self) -> Phase:
        return self._over_all_classes("main", self.recipe.main, lambda main, images: main(images)[1])

    def _cloud(self) -> Phase:
        return self._over_all_classes("cloud", self.recipe.cloud, lambda cloud, images: cloud(images))

    def _over_all_classes(
        self, name: str, config: PhaseConfig, forward: Callable[[nn.Module, Tensor], Tensor]
    ) -> Phase:
        train, validation = (torch.from_numpy(rows) for rows in (self.splits.train, self.splits.validation))
        return Phase(
            name=name,
            config=config,
            module=self.networks.trained[name],
            forward=forward,
            train_index=train,
            train_labels=self.labels[train],
            validation_images=self.images[validation],
            validation_labels=self.labels[validation],
        )

    def _extension(self) -> Phase:
        self._split_classes()
        main = self.networks.meanet.main.eval().requires_grad_(False)

        def forward(path: nn.Module, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = main.features(images)
            logits: Tensor = path(images, features)
            return logits

        train, train_labels = self._hard_rows(self.splits.train)
        validation, validation_labels = self._hard_rows(self.splits.validation)
        return Phase(
            name="extension",
            config=self.recipe.extension,
            module=self.networks.meanet.path,
            forward=forward,
            train_index=train,
            train_labels=train_labels,
            validation_images=self.images[validation],
            validation_labels=validation_labels,
        )

    @torch.no_grad()
    def _split_classes(self) -> None:
        """Choose the hard classes on validation; a function of the main block's weights, so repeatable."""
        main = self.networks.meanet.main.eval()
        rows = self.splits.validation
        parts = torch.split(self.images[torch.from_numpy(rows)], 512)
        pred = torch.cat([main(part)[1].argmax(dim=1) for part in parts]).numpy()
        table = self.splits.table
        precision = class_precision(pred, table.labels[rows], table.num_classes)
        self.state.class_precision = precision.tolist()
        self.state.hard_classes = hardest_classes(precision, self.recipe.split.num_hard_classes)

    def _hard_rows(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """The rows whose true class is hard, and their labels remapped to 0..H-1."""
        remap = np.full(self.splits.table.num_classes, -1, dtype=np.int64)
        remap[self.state.hard_classes] = np.arange(len(self.state.hard_classes))
        labels = remap[self.splits.table.labels[rows]]
        return torch.from_numpy(rows[labels >= 0]), torch.from_numpy(labels[labels >= 0])
