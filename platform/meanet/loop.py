"""The one training loop: SGD over a phase's samples, epoch by epoch, resumable after any of them.

The loop knows no cluster: what surrounds it (one process, or a Ray Train worker) is a `Worker`.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meanet.config import PhaseConfig, Precision
from meanet.errors import UserError
from meanet.feeds import Feed, Share

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


INDEPENDENT = (("main", "extension"), ("cloud",))
"""Groups of phases of which no group waits for another: the extension needs the main block, the cloud nothing."""


def merged(parts: Sequence[tuple[Sequence[str], State]]) -> State:
    """The finished state of a run whose phases were trained apart.

    Args:
        parts: phases, and the state that has trained them.
    """
    whole = State(parts[0][1].recipe, phase=len(PHASES))
    for phases, state in parts:
        whole.weights |= {phase: state.weights[phase] for phase in phases}
        whole.history += [row for row in state.history if row["phase"] in phases]
        if "main" in phases:
            whole.hard_classes, whole.class_precision = state.hard_classes, state.class_precision
    whole.history.sort(key=lambda row: (PHASES.index(row["phase"]), row["epoch"]))
    return whole


class Worker(Protocol):
    """What surrounds the loop."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make a module data-parallel."""

    def synchronise(self, module: nn.Module) -> None:
        """Give every worker the first one's buffers: batch-norm statistics drift apart between workers."""

    def total(self, counts: Tensor) -> Tensor:
        """Sum over all workers."""

    def report(self, row: Epoch, state: State) -> None:
        """An epoch is over: called by every worker, with the same state."""


class SingleProcess:
    """The loop in this process, alone: no Ray, no process group."""

    rank = 0
    world_size = 1

    def __init__(
        self, on_epoch: Callable[[Epoch, State], None] | None = None, device: torch.device | None = None
    ) -> None:
        self._on_epoch = on_epoch
        self.device = device or torch.device("cpu")

    def wrap(self, module: nn.Module) -> nn.Module:
        """Nothing to share gradients with."""
        return module

    def synchronise(self, module: nn.Module) -> None:
        """Nothing to share buffers with."""

    def total(self, counts: Tensor) -> Tensor:
        """There is no other."""
        return counts

    def report(self, row: Epoch, state: State) -> None:
        """Hand the epoch to the caller's function."""
        if self._on_epoch:
            self._on_epoch(row, state)


@dataclass(frozen=True)
class Phase:
    """What is trained, how the logits come about, on which samples, towards which labels."""

    name: str
    config: PhaseConfig
    precision: Precision
    module: nn.Module
    forward: Callable[[nn.Module, Tensor, Tensor], Tensor]
    """(module, images, their rows) -> logits."""
    labels: Tensor
    """(N,) by row of the table; -1 for rows that this phase has no use for."""
    train_rows: Tensor
    """Rows to train on."""
    validation_rows: Tensor
    """Rows to validate on."""
    evaluation_batch: int
    """So many at once."""


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


def autocast(device: torch.device, *, enabled: bool) -> torch.autocast:
    """Automatic mixed precision in bfloat16, whose range needs no loss scaling (Kalamkar et al., arXiv 1905.12322)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class PhaseRunner:
    """Trains one phase, epoch by epoch, from wherever the state says it stands."""

    compiles = True
    """Whether the module is compiled where there is a GPU and a C compiler."""

    def __init__(self, phase: Phase, feed: Feed, worker: Worker, state: State, seed: int) -> None:
        self.phase, self.feed, self.worker, self.state, self.seed = phase, feed, worker, state, seed
        config = phase.config
        self.mixed = phase.precision == "bfloat16"
        self.labels = phase.labels.to(worker.device)
        module = phase.module.to(worker.device)
        if self.mixed:
            module.to(memory_format=torch.channels_last)
        self.module = worker.wrap(module)
        if self.compiles and worker.device.type == "cuda" and shutil.which("cc"):  # which builds its kernels
            self.module.compile()
        self.optimizer = torch.optim.SGD(
            module.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov and config.momentum > 0,
            fused=self.mixed or worker.device.type == "cuda",
        )
        if state.optimizer:
            self.optimizer.load_state_dict(state.optimizer)
        share = len(phase.train_rows) // worker.world_size
        if share < 2:
            raise UserError(
                f"phase {phase.name} has {len(phase.train_rows)} images for {worker.world_size} workers: "
                "add images or lower the number of workers"
            )
        per_worker = min(share, max(1, config.batch_size // worker.world_size))
        self.share = Share(worker.rank, worker.world_size, per_worker)
        self.steps = min(feed.steps(phase.train_rows, self.share), config.max_steps or 2**31)
        if not self.steps:
            raise UserError(
                f"phase {phase.name}: the part of one of {worker.world_size} workers holds fewer than the {per_worker} "
                "images of its step: lower the batch size or the number of workers"
            )

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
                self.steps * self.share.per_worker * self.worker.world_size,
            )
            self.state.epoch = epoch + 1
            self.state.weights[self.phase.name] = self.phase.module.state_dict()
            self.state.optimizer = self.optimizer.state_dict()
            self.state.history.append(asdict(row))
            if self.state.epoch == self.phase.config.epochs:
                self.state.phase, self.state.epoch, self.state.optimizer = self.state.phase + 1, 0, {}
            self.worker.report(row, self.state)

    def _train_epoch(self, epoch: int) -> float:
        """One shuffled pass; nothing is read back from the device before its end."""
        config = self.phase.config
        seeds = np.random.SeedSequence([self.seed, PHASES.index(self.phase.name), epoch]).generate_state(2)
        batches = self.feed.train(self.phase.train_rows, self.share, (int(seeds[0]), int(seeds[1])), self.steps)
        self.module.train()
        total = torch.zeros((), device=self.worker.device)
        for step, (rows, images) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * self.steps + step, self.steps)
            with autocast(self.worker.device, enabled=self.mixed):
                logits = self.phase.forward(self.module, images, rows)
            labels = self.labels[rows]
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach()
        return float(total) / self.steps

    @torch.no_grad()
    def _validate(self) -> float:
        """Accuracy over every worker's part of the validation rows."""
        phase, worker = self.phase, self.worker
        phase.module.eval()
        counts = torch.zeros(2, device=worker.device)
        mine = phase.validation_rows[worker.rank :: worker.world_size]
        for rows, images in self.feed.evaluate(mine, phase.evaluation_batch):
            with autocast(self.worker.device, enabled=self.mixed):
                logits = phase.forward(phase.module, images, rows)
            counts[0] += (logits.argmax(dim=1) == self.labels[rows]).sum()
            counts[1] += len(rows)
        right, seen = worker.total(counts)
        return float(right) / max(1.0, float(seen))
