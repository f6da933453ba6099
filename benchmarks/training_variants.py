"""The variants of `benchmarks.training`, one in this process: `python -m benchmarks.training_variants plain ...`."""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import Memory
from meanet.config import PhaseConfig, Recipe
from meanet.data import ImageTable, Splits
from meanet.feeds import ResidentFeed, Scaling, Share
from meanet.loop import Epoch, SingleProcess, State, autocast, learning_rate
from meanet.recipes import recipe
from meanet.training import Trainer, build_networks, preprocessing_of

Variant = Literal["plain", "ours", "float32", "ray1", "ray2", "joint"]
VARIANTS: tuple[Variant, ...] = ("plain", "ours", "float32", "ray1", "ray2", "joint")
BATCH = 128
_RATE = 0.1


@dataclass(frozen=True)
class One:
    """One variant, in this process; its figures as JSON on standard output."""

    variant: Annotated[Variant, tyro.conf.Positional]
    splits: Path
    """A NumPy archive of images, labels and rows."""
    seed: int
    epochs: int
    extension_epochs: int
    launched: float
    """When the parent started this process, by the clock."""


def the_recipe(one: One) -> Recipe:
    """`cifar100_resnet32_b` under one cycle, the main phase and the extension phase."""
    base = recipe("cifar100_resnet32_b_fast")
    phase = PhaseConfig(epochs=one.epochs, batch_size=BATCH, learning_rate=_RATE, weight_decay=5e-4)
    return dataclasses.replace(
        base,
        seed=one.seed,
        precision="float32" if one.variant in ("float32", "plain") else "bfloat16",
        main=phase,
        extension=dataclasses.replace(phase, epochs=one.extension_epochs),
        cloud=dataclasses.replace(phase, epochs=1, max_steps=1),
    )


def read_splits(path: Path) -> Splits:
    """What the parent has written."""
    kept = np.load(path)
    table = ImageTable(kept["images"], kept["labels"], tuple(str(name) for name in range(100)), "slice")
    return Splits(table, kept["train"], kept["validation"], kept["validation"][:1])


class Clock:
    """When each epoch of each phase ended, and how well it went."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, float]]] = {}

    def note(self, phase: str, at: float, accuracy: float, samples: int) -> None:
        """An epoch is over."""
        self.rows.setdefault(phase, []).append({"at": at, "accuracy": accuracy, "samples": samples})

    def figures(self, started: float) -> dict[str, Any]:
        """Of each phase: seconds an epoch (median, but the first), images a second, final validation accuracy."""
        found = {}
        before = started
        for phase, rows in self.rows.items():
            ends = [row["at"] for row in rows]
            lengths = np.diff([before, *ends])
            median = float(np.median(lengths[1:] if len(lengths) > 1 else lengths))
            found[phase] = {
                "epoch_seconds": median,
                "images_per_second": rows[-1]["samples"] / median,
                "accuracy": rows[-1]["accuracy"],
            }
            before = ends[-1]
        return found


def ours(one: One, splits: Splits) -> dict[str, Any]:
    """meanet's loop in this process: main, then extension in a fresh trainer, so that its memory stands alone."""
    asked, clock, peaks = the_recipe(one), Clock(), {}
    state = State(asked.to_dict())
    began = 0.0
    for number, phase in enumerate(("main", "extension")):

        def on_epoch(row: Epoch, _state: State) -> None:
            clock.note(row.phase, time.time(), row.validation_accuracy, row.samples)

        trainer = Trainer(asked, splits, SingleProcess(on_epoch), state)
        memory = Memory()
        began = began or time.time()
        _run_phase(trainer, number)
        peaks[phase] = memory.peak()
        state = trainer.state
        del trainer
    return {"started": began, "phases": clock.figures(began), "peak": peaks}


def _run_phase(trainer: Trainer, number: int) -> None:
    from meanet.loop import PhaseRunner

    assert trainer.state.phase == number, "phases follow in order"
    phase = (trainer._main, trainer._extension)[number]()
    PhaseRunner(phase, trainer.feed, trainer.worker, trainer.state, trainer.recipe.seed).run()


def under_ray(one: One, splits: Splits, workers: int) -> dict[str, Any]:
    """meanet's loop under Ray Train, as `jobs.train` runs it."""
    from jobs._cli import Environment
    from meanet import cluster

    Environment.read()
    clock, times = Clock(), {"started": 0.0}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            times["started"] = event["at"]
        else:
            clock.note(event["phase"], event["at"], event["validation_accuracy"], event["samples"])

    asked = the_recipe(one)
    store = cluster.OBJECT_STORE_BYTES + splits.table.num_bytes
    with tempfile.TemporaryDirectory() as storage, cluster.ray_cluster(None, store):
        cluster.train(
            asked, splits, storage=storage, name="bench", num_workers=workers, on_event=on_event, parallel=False
        )
    return {"started": times["started"], "phases": clock.figures(times["started"]), "peak": {}}


def plain(one: One, splits: Splits) -> dict[str, Any]:
    """What a user would write: torchvision transforms in DataLoader processes, float32, the same schedule."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    table = splits.table
    assert isinstance(table, ImageTable), "the slice is in memory"
    preprocessing = preprocessing_of(the_recipe(one), splits)
    tail = [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]

    class Slice(Dataset[tuple[Tensor, int]]):
        def __init__(self, rows: Any, transform: Callable[[Any], Tensor]) -> None:
            self.rows, self.transform = rows, transform

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            row = self.rows[number]
            return self.transform(table.images[row]), int(table.labels[row])

    training = transforms.Compose([transforms.ToPILImage(), *augment, *tail])
    generator = torch.Generator().manual_seed(one.seed)
    train = DataLoader(
        Slice(splits.train, training), BATCH, shuffle=True, drop_last=True, num_workers=2, generator=generator
    )
    held = DataLoader(Slice(splits.validation, transforms.Compose(tail)), 512, num_workers=2)
    config, clock = the_recipe(one).main, Clock()
    model = build_networks(the_recipe(one), (3, 32, 32), 100).meanet.main
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, 0.9, weight_decay=5e-4, nesterov=True)
    memory, began = Memory(), time.time()
    for epoch in range(config.epochs):
        model.train()
        for step, (images, labels) in enumerate(train):
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch * len(train) + step, len(train))
            loss = F.cross_entropy(model(images)[1], labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(images)[1].argmax(1) == labels).sum()) for images, labels in held)
        clock.note("main", time.time(), right / len(splits.validation), len(train) * BATCH)
    return {"started": began, "phases": clock.figures(began), "peak": {"main": memory.peak()}}


def joint(one: One, splits: Splits) -> dict[str, Any]:
    """All three edge blocks end to end: every image through all, both exits' losses, gradients into the main block."""
    asked, clock = the_recipe(one), Clock()
    meanet = build_networks(asked, (3, 32, 32), 100).meanet.to(memory_format=torch.channels_last)
    table = splits.table
    assert isinstance(table, ImageTable), "the slice is in memory"
    cpu = torch.device("cpu")
    feed = ResidentFeed(table, asked.data, Scaling(preprocessing_of(asked, splits), cpu, channels_last=True))
    labels, rows = torch.from_numpy(table.labels), torch.from_numpy(splits.train)
    optimizer = torch.optim.SGD(meanet.parameters(), _RATE, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    share = Share(0, 1, BATCH)
    steps = feed.steps(rows, share)
    memory, began = Memory(), time.time()
    for epoch in range(one.extension_epochs):
        meanet.train()
        for found, images in feed.train(rows, share, (one.seed, epoch), steps):
            loss = _joint_loss(meanet, images, labels[found])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        clock.note("joint", time.time(), float("nan"), steps * BATCH)
    return {"started": began, "phases": clock.figures(began), "peak": {"joint": memory.peak()}}


def _joint_loss(meanet: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Classes 0 to 49 stand for the hard ones."""
    net: Any = meanet
    with autocast(images.device, enabled=True):
        features, logits = net.main(images)
        path = net.path.extension(torch.cat((features, net.path.adaptive(images)), dim=1))
    hard = labels < 50
    return F.cross_entropy(logits.float(), labels) + F.cross_entropy(path[hard].float(), labels[hard])


def run_one(one: One) -> dict[str, Any]:
    """A variant's figures; times count from the parent's launch."""
    torch.set_num_threads(os.cpu_count() or 1)
    splits = read_splits(one.splits)
    if one.variant in ("ray1", "ray2"):
        found = under_ray(one, splits, int(one.variant[-1]))
    else:
        found = {"plain": plain, "joint": joint}.get(one.variant, ours)(one, splits)
    found["seconds_to_first_step"] = found.pop("started") - one.launched
    return found


if __name__ == "__main__":
    print(json.dumps(run_one(tyro.cli(One))))
