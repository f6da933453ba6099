"""The one training loop: SGD over a phase's samples, epoch by epoch, resumable after any of them.

The loop knows no cluster: what surrounds it (one process, or a Ray Train worker) is a `Worker`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meanet.config import PhaseConfig
from meanet.errors import UserError
from meanet.feeds import ResidentFeed

PHASES = ("main", "extension", "cloud")


@dataclass(frozen=True)
class Epoch:
    """One line of a run's history."""

    phase: str
    """main, extension or cloud."""
    epoch: int
    """1-based."""
    epochs: int
    """Of this phase."""
    loss: float
    """Mean training loss, cross-entropy in nats."""
    validation_accuracy: float
    """0..1; of the phase's own labels."""
    learning_rate: float
    """At the epoch's last step."""
    seconds: float
    """Wall time."""
    samples: int
    """Trained on, over all workers."""


@dataclass
class State:
    """Everything a run needs to go on: plain tensors and JSON types, so that loading it unpickles no code."""

    recipe: dict[str, Any]
    phase: int = 0
    """Index in `PHASES` of the phase under way; len(PHASES) = finished."""
    epoch: int = 0
    """Finished epochs of that phase."""
    hard_classes: list[int] = field(default_factory=list)
    """Hardest first; empty until the main phase is over."""
    class_precision: list[float] = field(default_factory=list)
    """Validation precision of the main exit by class id; empty until the main phase is over."""
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """State dict of each trained module: main, extension, cloud."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Of the phase under way; empty between phases."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """`Epoch` rows."""

    @property
    def finished(self) -> bool:
        """Whether every phase is over."""
        return self.phase == len(PHASES)


class Worker(Protocol):
    """What surrounds the loop."""

    rank: int
    world_size: int

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make a module data-parallel."""

    def synchronise(self, module: nn.Module) -> None:
        """Give every worker the first one's buffers: batch-norm statistics drift apart between workers."""

    def report(self, row: Epoch, state: State) -> None:
        """An epoch is over: called by every worker, with the same state."""


class SingleProcess:
    """The loop in this process, alone: no Ray, no process group."""

    rank = 0
    world_size = 1

    def __init__(self, on_epoch: Callable[[Epoch, State], None] | None = None) -> None:
        self._on_epoch = on_epoch

    def wrap(self, module: nn.Module) -> nn.Module:
        """Nothing to share gradients with."""
        return module

    def synchronise(self, module: nn.Module) -> None:
        """Nothing to share buffers with."""

    def report(self, row: Epoch, state: State) -> None:
        """Hand the epoch to the caller's function."""
        if self._on_epoch:
            self._on_epoch(row, state)


@dataclass(frozen=True)
class Phase:
    """What is trained, how the logits come about, on which samples, towards which labels."""

    name: str
    config: PhaseConfig
    module: nn.Module
    forward: Callable[[nn.Module, Tensor], Tensor]
    """(module, images) -> logits."""
    train_index: Tensor
    """Rows of the feed to train on."""
    train_labels: Tensor
    """Aligned with train_index."""
    validation_images: Tensor
    validation_labels: Tensor


def learning_rate(config: PhaseConfig, step: int, steps_per_epoch: int) -> float:
    """The rate at a step: one-cycle (Smith, arXiv 1708.07120; 30% warm-up, cosine to zero) or steps."""
    if config.schedule == "steps":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return float(config.learning_rate * config.gamma**passed)
    total = config.epochs * steps_per_epoch
    warm_up = max(1.0, 0.3 * total)
    if step < warm_up:
        return config.learning_rate * (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1.0, total - warm_up)
    return config.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


class PhaseRunner:
    """Trains one phase, epoch by epoch, from wherever the state says it stands."""

    def __init__(self, phase: Phase, feed: ResidentFeed, worker: Worker, state: State, seed: int) -> None:
        self.phase, self.feed, self.worker, self.state, self.seed = phase, feed, worker, state, seed
        config = phase.config
        self.module = worker.wrap(phase.module)
        self.optimizer = torch.optim.SGD(
            phase.module.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        if state.optimizer:
            self.optimizer.load_state_dict(state.optimizer)
        share = len(phase.train_index) // worker.world_size
        if share < 2:
            raise UserError(
                f"phase {phase.name} has {len(phase.train_index)} images for {worker.world_size} workers: "
                "add images or lower the number of workers"
            )
        self.per_worker = min(share, max(1, config.batch_size // worker.world_size))
        self.steps = share // self.per_worker

    def run(self) -> None:
        """Train the epochs that are left, reporting each."""
        for epoch in range(self.state.epoch, self.phase.config.epochs):
            started = time.perf_counter()
            loss = self._train_epoch(epoch)
            self.worker.synchronise(self.phase.module)
            rate = self.optimizer.param_groups[0]["lr"]
            row = Epoch(
                self.phase.name,
                epoch + 1,
                self.phase.config.epochs,
                loss,
                self._validate(),
                rate,
                time.perf_counter() - started,
                self.steps * self.per_worker * self.worker.world_size,
            )
            self.state.epoch = epoch + 1
            self.state.weights[self.phase.name] = self.phase.module.state_dict()
            self.state.optimizer = self.optimizer.state_dict()
            self.state.history.append(asdict(row))
            if self.state.epoch == self.phase.config.epochs:
                self.state.phase, self.state.epoch, self.state.optimizer = self.state.phase + 1, 0, {}
            self.worker.report(row, self.state)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's share of one shuffled pass: every worker draws the same order and takes its slice."""
        phase, worker = self.phase, self.worker
        seeds = np.random.SeedSequence([self.seed, PHASES.index(phase.name), epoch]).generate_state(2)
        order = torch.randperm(len(phase.train_index), generator=torch.Generator().manual_seed(int(seeds[0])))
        augment = torch.Generator().manual_seed(int(seeds[1]) + worker.rank)
        for step in range(self.steps):
            start = (step * worker.world_size + worker.rank) * self.per_worker
            rows = order[start : start + self.per_worker]
            yield self.feed.batch(phase.train_index[rows], augment), phase.train_labels[rows]

    def _train_epoch(self, epoch: int) -> float:
        config = self.phase.config
        self.module.train()
        total = torch.zeros(())
        for step, (images, labels) in enumerate(self._batches(epoch)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * self.steps + step, self.steps)
            logits = self.phase.forward(self.module, images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach()
        return float(total) / self.steps

    @torch.no_grad()
    def _validate(self) -> float:
        phase = self.phase
        phase.module.eval()
        right = 0
        for start in range(0, len(phase.validation_labels), 512):
            part = slice(start, start + 512)
            logits = phase.forward(phase.module, phase.validation_images[part])
            right += int((logits.argmax(dim=1) == phase.validation_labels[part]).sum())
        return right / max(1, len(phase.validation_labels))
