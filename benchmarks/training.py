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

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.memory import TreeMemory
from benchmarks.training_variants import BATCH, VARIANTS, Variant
from meanet import data
from meanet.config import DataConfig
from meanet.data import ImageTable

_COUNTS = ("images", "validation", "epochs", "extension_epochs", "rounds")


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


def launch(variant: Variant, splits: Path, seed: int, flags: Flags) -> dict[str, Any]:
    """A variant in a process tree of its own."""
    asked = [f"--splits={splits}", f"--seed={seed}", f"--epochs={flags.epochs}"]
    asked += [f"--extension-epochs={flags.extension_epochs}", f"--launched={time.time()}"]
    command = [sys.executable, "-m", "benchmarks.training_variants", variant, *asked]
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
            f"ResNet-32 B, {flags.images} images of CIFAR-100, batch {BATCH}, one cycle, {flags.epochs} epochs of the "
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
    measure(tyro.cli(Flags, prog="python -m benchmarks.training"))


if __name__ == "__main__":
    main()
