"""MEANet's phases (section IV), in order, resumable after any epoch.

    main on all classes -> class split by validation precision -> extension + adaptive on hard classes only, the main
    block frozen and in evaluation mode -> the cloud network on all classes

Shape letters: B batch, C classes, H hard classes.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from meanet.class_split import class_precision, hard_classes
from meanet.config import PhaseConfig, Recipe
from meanet.data import ImageTable, Splits
from meanet.energy import BytesMoved, Macs, cost_model
from meanet.feeds import Batch, Feed, ResidentFeed, Scaling
from meanet.loop import PHASES, Phase, PhaseRunner, State, Worker, autocast
from meanet.models import CloudNet, MainBlock, MEANet, macs_of
from meanet.models.backbones import load_pretrained
from meanet.preprocessing import Preprocessing


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
    """Freshly initialised networks for (C, H, W) images; the recipe's seed fixes every weight.

    Raises:
        UserError: the networks do not fit the images, or the class split asks for no class or for all of them.
    """
    num_hard = recipe.split.size(num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        meanet = MEANet(recipe.model, image_shape, num_classes, num_hard)
        return Networks(meanet, CloudNet(recipe.model, image_shape, num_classes))


def load_published_weights(recipe: Recipe, networks: Networks) -> None:
    """Where the recipe starts from torchvision's weights, take them.

    Raises:
        UserError: they cannot be had.
    """
    main, cloud = networks.meanet.main, networks.cloud
    if recipe.model.pretrained:
        load_pretrained(recipe.model.backbone, main.features, main.exit)
    if recipe.model.cloud_pretrained:
        load_pretrained(recipe.model.cloud_backbone, cloud.features, cloud.exit)


def preprocessing_of(recipe: Recipe, splits: Splits) -> Preprocessing:
    """What the recipe's networks take, by its training images."""
    imagenet = recipe.model.pretrained or recipe.model.cloud_pretrained
    return Preprocessing.of(splits, resize=recipe.data.image_size is not None, imagenet=imagenet)


def check(recipe: Recipe, splits: Splits) -> None:
    """Find a user's mistakes before a worker starts.

    Raises:
        UserError: the class split asks for no class or for all of them; networks that do not fit the images; published
            weights that cannot be had; profiles that do not exist.
    """
    height, width, channels = splits.table.image_shape
    networks = build_networks(recipe, (channels, height, width), splits.table.num_classes)
    load_published_weights(recipe, networks)
    cost_model(recipe.energy, Macs(0, 0, 0, 0), BytesMoved(0, 0, 0))


def epoch_work(recipe: Recipe, splits: Splits) -> dict[str, float]:
    """MACs of one epoch of each phase: three passes' worth of what is trained, one of what is frozen."""
    networks = build_networks(recipe, preprocessing_of(recipe, splits).image_shape, splits.table.num_classes)
    macs = macs_of(networks.meanet, networks.cloud, preprocessing_of(recipe, splits).image_shape)
    hard = recipe.split.size(splits.table.num_classes) / splits.table.num_classes
    of_image = {
        "main": 3 * macs.main,
        "extension": hard * (macs.main + 3 * (macs.adaptive + macs.extension)),
        "cloud": 3 * macs.cloud,
    }
    return {name: float(len(splits.train) * value) for name, value in of_image.items()}


MakeFeed = Callable[[Recipe, Splits, Scaling], Feed]


def resident_feed(recipe: Recipe, splits: Splits, scaling: Scaling) -> Feed:
    """The feed of a set in memory."""
    assert isinstance(splits.table, ImageTable), "a streamed set needs a streaming feed"
    return ResidentFeed(splits.table, recipe.data, scaling)


_CACHE_BYTES = 2**30


class FrozenFeatures:
    """The frozen main block's features, without a graph; computed once a row where nothing random changes its input."""

    def __init__(self, main: MainBlock, autocast: Callable[[], torch.autocast]) -> None:
        self._main, self._autocast = main, autocast
        self._place: Tensor | None = None

    @torch.no_grad()
    def keep(self, batches: Iterable[Batch], rows: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        """Compute those of `rows` now, unless they take more than a gigabyte.

        Args:
            batches: every one of these rows once.
            rows: in the table.
            num_rows: of the table.
            dtype: to keep them in.
        """
        if len(rows) * int(np.prod(self._main.feature_shape)) * dtype.itemsize > _CACHE_BYTES:
            return
        self._place = torch.full((num_rows,), -1, device=rows.device)
        self._place[rows] = torch.arange(len(rows), device=rows.device)
        self._kept = torch.empty((len(rows), *self._main.feature_shape), dtype=dtype, device=rows.device)
        for found, images in batches:
            with self._autocast():
                self._kept[self._place[found]] = self._main.features(images).to(dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """(B, F, h, w) of the images of these rows."""
        if self._place is not None:
            return self._kept[self._place[rows]]
        features: Tensor = self._main.features(images)
        return features


class Trainer:
    """All phases of one recipe over one data set; `check` them first."""

    runner = PhaseRunner
    """What trains a phase."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        worker: Worker,
        state: State | None = None,
        make_feed: MakeFeed = resident_feed,
    ) -> None:
        self.recipe, self.splits, self.worker = recipe, splits, worker
        self.state = state or State(recipe.to_dict())
        self.preprocessing = preprocessing_of(recipe, splits)
        self.networks = build_networks(recipe, self.preprocessing.image_shape, splits.table.num_classes)
        if not self.state.finished:
            load_published_weights(recipe, self.networks)  # of phases that are yet to come, too
        for name, weights in self.state.weights.items():
            self.networks.trained[name].load_state_dict(weights)
        mixed = recipe.precision == "bfloat16"
        self.feed = make_feed(recipe, splits, Scaling(self.preprocessing, worker.device, channels_last=mixed))
        self.labels = torch.from_numpy(splits.table.labels.copy())

    def run(self, phases: Collection[str] = PHASES) -> State:
        """Train what is left of these phases; returns the finished state, in which the others are as they were."""
        make = {"main": self._main, "extension": self._extension, "cloud": self._cloud}
        while not self.state.finished:
            name = PHASES[self.state.phase]
            if name in phases:
                self.runner(make[name](), self.feed, self.worker, self.state, self.recipe.seed).run()
            else:
                self.state.phase += 1
        return self.state

    def _main(self) -> Phase:
        return self._over_all_classes("main", self.recipe.main, lambda main, images, _rows: main(images)[1])

    def _cloud(self) -> Phase:
        return self._over_all_classes("cloud", self.recipe.cloud, lambda cloud, images, _rows: cloud(images))

    def _over_all_classes(
        self, name: str, config: PhaseConfig, forward: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> Phase:
        return Phase(
            name=name,
            config=config,
            precision=self.recipe.precision,
            module=self.networks.trained[name],
            forward=forward,
            labels=self.labels,
            train_rows=torch.from_numpy(self.splits.train),
            validation_rows=torch.from_numpy(self.splits.validation),
            evaluation_batch=self.splits.table.evaluation_batch,
        )

    def _extension(self) -> Phase:
        main = self.networks.meanet.main.to(self.worker.device).eval().requires_grad_(False)
        if self.recipe.precision == "bfloat16":
            main.to(memory_format=torch.channels_last)
        if not (self.state.epoch and self.state.hard_classes):
            self._split_classes()  # once begun, a phase keeps its classes: elsewhere, rounding might choose others
        labels = self._hard_labels()
        train, validation = (
            torch.from_numpy(rows)[labels[rows] >= 0] for rows in (self.splits.train, self.splits.validation)
        )
        features = {True: self._features(train, fixed=not self.recipe.data.augmented)}
        features[False] = self._features(validation, fixed=True)

        def forward(path: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
            logits: Tensor = path(images, features[path.training](images, rows))
            return logits

        return Phase(
            name="extension",
            config=self.recipe.extension,
            precision=self.recipe.precision,
            module=self.networks.meanet.path,
            forward=forward,
            labels=labels,
            train_rows=train,
            validation_rows=validation,
            evaluation_batch=self.splits.table.evaluation_batch,
        )

    def _features(self, rows: Tensor, *, fixed: bool) -> FrozenFeatures:
        mixed = self.recipe.precision == "bfloat16"
        device = self.worker.device
        features = FrozenFeatures(self.networks.meanet.main, lambda: autocast(device, enabled=mixed))
        if fixed:
            batches = self.feed.evaluate(rows, self.splits.table.evaluation_batch)
            features.keep(batches, rows.to(device), len(self.labels), torch.bfloat16 if mixed else torch.float32)
        return features

    @torch.no_grad()
    def _split_classes(self) -> None:
        """Choose the hard classes on validation; each worker asks the main exit of its part and sees all answers."""
        main, splits, split, worker = self.networks.meanet.main, self.splits, self.recipe.split, self.worker
        rows = splits.validation
        answers = torch.zeros(len(self.labels), device=worker.device)
        mine = torch.from_numpy(rows)[worker.rank :: worker.world_size]
        for found, images in self.feed.evaluate(mine, splits.table.evaluation_batch):
            answers[found] = main(images)[1].argmax(dim=1).to(answers.dtype)
        pred = worker.total(answers).cpu().numpy().astype(np.int64)[rows]
        labels, num_classes = splits.table.labels[rows], splits.table.num_classes
        self.state.class_precision = class_precision(pred, labels, num_classes).tolist()
        self.state.hard_classes = hard_classes(
            split.method,
            pred,
            labels,
            num_classes=num_classes,
            num_hard=split.size(num_classes),
            seed=self.recipe.seed,
        )

    def _hard_labels(self) -> Tensor:
        """(N,) labels remapped to 0..H-1; -1 where the true class is easy."""
        remap = np.full(self.splits.table.num_classes, -1, dtype=np.int64)
        remap[self.state.hard_classes] = np.arange(len(self.state.hard_classes))
        return torch.from_numpy(remap[self.splits.table.labels])
