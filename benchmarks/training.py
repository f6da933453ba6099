"""Training speed, side by side: `python -m benchmarks.training --data parquet:cifar100/train.parquet`
-> docs/benchmarks/training.md.

ResNet-32 B on 10,000 images of CIFAR-100. Each variant is a process tree of its own, run in turn, several rounds over:

    plain    the loop that a user would write: float32 PyTorch, DataLoader processes, torchvision transforms
    ours     meanet's loop in one process, without Ray (bfloat16 autocast, channels-last, bytes in memory)
    float32  the same in full precision
    ray1     meanet's loop under Ray Train, one worker
    ray2     under Ray Train, two workers
    joint    main, adaptive and extension block trained together end to end, as `ours` trains
"""

import ctypes
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from meanet import data
from meanet.config import DataConfig, PhaseConfig, Recipe
from meanet.data import ImageTable, Splits
from meanet.feeds import ResidentFeed, Scaling, Share
from meanet.loop import Epoch, SingleProcess, State, autocast, learning_rate
from meanet.recipes import recipe
from meanet.training import Trainer, build_networks, preprocessing_of

Variant = Literal["plain", "ours", "float32", "ray1", "ray2", "joint"]
VARIANTS: tuple[Variant, ...] = ("plain", "ours", "float32", "ray1", "ray2", "joint")
_COUNTS = ("images", "validation", "epochs", "extension_epochs", "rounds")
_BATCH = 128
_RATE = 0.1


@dataclass(frozen=True)
class Flags:
    """Time every variant and write the table."""

    data: str = "cifar100"
    """Source of the images, as --data.source of a job."""
    images: int = 10_000
    """To train on."""
    validation: int = 5_000
    """To measure accuracy on."""
    epochs: int = 6
    """Of the main phase."""
    extension_epochs: int = 3
    """Of the extension phase, and of joint training."""
    rounds: int = 3
    """Each variant is run so many times; the seed is the round."""
    variants: tuple[Variant, ...] = VARIANTS
    """Which."""
    output: Path = Path("docs/benchmarks/training.md")
    """The page."""

    @property
    def command(self) -> str:
        """What repeats this run."""
        words = [f"--{name.replace('_', '-')} {getattr(self, name)}" for name in _COUNTS]
        words += ["--variants", *self.variants]
        return f"python -m benchmarks.training --data {self.data} {' '.join(words)}"


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
    phase = PhaseConfig(epochs=one.epochs, batch_size=_BATCH, learning_rate=_RATE, weight_decay=5e-4)
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


class Memory:
    """Resident memory of this process, in bytes, by the kernel."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier phase has freed is not resident any more
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self._before = self._status("VmRSS")

    def peak(self) -> int:
        """Above what was resident when this was made."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


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
        cluster.train(asked, splits, storage=storage, name="bench", num_workers=workers, on_event=on_event)
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
        Slice(splits.train, training), _BATCH, shuffle=True, drop_last=True, num_workers=2, generator=generator
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
        clock.note("main", time.time(), right / len(splits.validation), len(train) * _BATCH)
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
    share = Share(0, 1, _BATCH)
    steps = feed.steps(rows, share)
    memory, began = Memory(), time.time()
    for epoch in range(one.extension_epochs):
        meanet.train()
        for found, images in feed.train(rows, share, (one.seed, epoch), steps):
            loss = _joint_loss(meanet, images, labels[found])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        clock.note("joint", time.time(), float("nan"), steps * _BATCH)
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


class TreeMemory(threading.Thread):
    """The most memory that a process and all that it started hold: their own, and once what they share.

    From the kernel's counters: asking for proportional memory (PSS) walks every page, which slows what is measured.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self.done.wait(0.5):
            held = [_resident(pid) for pid in _tree(self.pid)]
            own, files, shared = (list(column) for column in zip(*held, strict=True))
            self.peak = max(self.peak, sum(own) + max(files) + max(shared))


def _tree(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _resident(pid: int) -> tuple[int, int, int]:
    """Bytes of a process that are its own, of files, and shared: Ray's object store."""
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return 0, 0, 0
    found = {row[0]: int(row[1]) * 1024 for row in rows if row and row[0].startswith("Rss")}
    return found.get("RssAnon:", 0), found.get("RssFile:", 0), found.get("RssShmem:", 0)


def launch(variant: Variant, splits: Path, seed: int, flags: Flags) -> dict[str, Any]:
    """A variant in a process tree of its own."""
    asked = [f"--splits={splits}", f"--seed={seed}", f"--epochs={flags.epochs}"]
    asked += [f"--extension-epochs={flags.extension_epochs}", f"--launched={time.time()}"]
    command = [sys.executable, "-m", "benchmarks.training", "one", variant, *asked]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = TreeMemory(process.pid)
    memory.start()
    stdout, _ = process.communicate()
    memory.done.set()
    memory.join()
    if process.returncode:
        raise SystemExit(f"{variant} failed")
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return {**found, "tree_peak": memory.peak}


def write_splits(flags: Flags, path: Path) -> None:
    """The slice: images drawn at random by a fixed seed."""
    table = data.load(DataConfig(source=flags.data), keep="resident")
    assert isinstance(table, ImageTable), "asked for"
    order = np.random.default_rng(0).permutation(len(table.labels))[: flags.images + flags.validation]
    rows = np.arange(len(order))
    np.savez(
        path,
        images=table.images[order],
        labels=table.labels[order],
        train=rows[: flags.images],
        validation=rows[flags.images :],
    )


def _spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    values = [scale * value for value in values]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


Runs = dict[str, list[dict[str, Any]]]


def _phase(runs: Runs, variant: str, phase: str, key: str) -> list[float]:
    return [run["phases"][phase][key] for run in runs[variant]]


def _ratios(over: list[float], under: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(over, under, strict=True)]


def _lines(runs: Runs) -> Iterator[str]:
    yield "| variant | phase | images/s | seconds an epoch | to first step, s | peak of all processes, MiB | accuracy |"
    yield "|---|---|---|---|---|---|---|"
    for variant, found in runs.items():
        for phase in found[0]["phases"]:
            if phase == "cloud":
                continue
            first = _spread([run["seconds_to_first_step"] for run in found])
            tree = _spread([run["tree_peak"] for run in found], 2**-20, 0)
            accuracy = _phase(runs, variant, phase, "accuracy")
            shown = "" if np.isnan(accuracy).any() else _spread(accuracy, 100, 1) + " %"
            speed = _spread(_phase(runs, variant, phase, "images_per_second"), 1, 0)
            seconds = _spread(_phase(runs, variant, phase, "epoch_seconds"), 1, 2)
            yield f"| {variant} | {phase} | {speed} | {seconds} | {first} | {tree} | {shown} |"


def _findings(runs: Runs) -> Iterator[str]:
    def speed(variant: str) -> list[float]:
        return _phase(runs, variant, "main", "images_per_second")

    def seconds(variant: str, phase: str = "main") -> list[float]:
        return _phase(runs, variant, phase, "epoch_seconds")

    if {"plain", "ours"} <= set(runs):
        yield f"- ours / plain, images a second: {_spread(_ratios(speed('ours'), speed('plain')), 1, 2)}"
        gap = [
            100 * (a - b)
            for a, b in zip(
                _phase(runs, "ours", "main", "accuracy"), _phase(runs, "plain", "main", "accuracy"), strict=True
            )
        ]
        yield f"- ours - plain, points of validation accuracy after the same epochs: {_spread(gap, 1, 1)}"
    if {"ours", "float32"} <= set(runs):
        yield f"- ours / float32, images a second: {_spread(_ratios(speed('ours'), speed('float32')), 1, 2)}"
    for variant in ("ray1", "ray2"):
        if {variant, "ours"} <= set(runs):
            tax = [100 * (ratio - 1) for ratio in _ratios(seconds(variant), seconds("ours"))]
            yield f"- {variant}: epoch time above the same loop without Ray: {_spread(tax, 1, 1)} %"
    if {"ours", "joint"} <= set(runs):
        of_phase = [run["peak"]["extension"] for run in runs["ours"]]
        of_joint = [run["peak"]["joint"] for run in runs["joint"]]
        yield (
            f"- peak memory above the loaded process: extension phase {_spread(of_phase, 2**-20, 0)} MiB, joint "
            f"training {_spread(of_joint, 2**-20, 0)} MiB; ratio {_spread(_ratios(of_phase, of_joint), 1, 2)}"
        )
        yield (
            f"- an epoch of the extension phase (hard classes) / one of joint training (all): "
            f"{_spread(_ratios(seconds('ours', 'extension'), seconds('joint', 'joint')), 1, 2)}"
        )


def page(runs: Runs, flags: Flags, commit: str) -> str:
    """The table, the ratios, and where they were measured."""
    names = ("torch", "torchvision", "ray", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return "\n".join(
        [
            "# Training speed",
            "",
            f"`{flags.command}`, {time.strftime('%Y-%m-%d')}, commit {commit}, {os.cpu_count()} CPUs "
            f"({_cpu()}, {platform.system()}), no GPU, Python {platform.python_version()}, {versions}.",
            "",
            f"ResNet-32 B, {flags.images} images of CIFAR-100, batch {_BATCH}, one cycle, {flags.epochs} epochs of the "
            f"main phase and {flags.extension_epochs} of the extension phase; validation on {flags.validation} others "
            f"after every epoch, which is in the times. {flags.rounds} rounds, variants in turn; median (least to "
            "most). An epoch's time is from the end of the one before to its own end, checkpoint and report to Ray "
            "Train included; the first of a phase is left out.",
            "",
            *_lines(runs),
            "",
            "Round by round:",
            "",
            *_findings(runs),
            "",
            "plain: float32 PyTorch, two DataLoader processes, torchvision transforms. ours: bfloat16 autocast, "
            "channels-last, bytes in memory, no Ray. float32: the same in full precision. ray1, ray2: as ours under "
            "Ray Train with one and two workers. joint: the three edge blocks end to end, as ours trains.",
            "",
        ]
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(flags: Flags) -> None:
    """Every variant, round by round, and the page."""
    from jobs._cli import commit

    runs: Runs = {variant: [] for variant in flags.variants}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "splits.npz"
        write_splits(flags, path)
        for seed in range(flags.rounds):
            for variant in flags.variants:
                runs[variant].append(launch(variant, path, seed, flags))
                print(f"round {seed} {variant}: {json.dumps(runs[variant][-1])}", file=sys.stderr, flush=True)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(page(runs, flags, commit()))
    print(flags.output.read_text())


def main() -> None:
    """Command-line entry."""
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(run_one(tyro.cli(One, args=sys.argv[2:]))))
    else:
        measure(tyro.cli(Flags, prog="python -m benchmarks.training"))


if __name__ == "__main__":
    main()
