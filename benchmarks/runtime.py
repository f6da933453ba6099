"""Engines of the edge, measured: `python -m benchmarks.runtime --train parquet:cifar100/train.parquet --test
parquet:cifar100/test.parquet` -> docs/benchmarks/runtime.md; exit status 1 where a bound is not kept.

The networks are those of a recorded CIFAR-100 run. On one core and one thread, in rounds that take turns:

1. One image at a time through the edge's runtime, eager torch beside ONNX Runtime.
2. Batches of 128 under the exit rule, beside what the main block alone and the extension block alone take.
3. Accuracy of each engine on CIFAR-100's test split.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from safetensors.torch import load_file

from jobs._cli import commit
from meanet import data, engines, model_spec
from meanet.artifact import EDGE, TrainedModel, save
from meanet.data import Splits
from meanet.engines import EdgeEngine, Exported
from meanet.errors import UserError, exit_on_user_error
from meanet.models import bytes_moved_of
from meanet.onnx_export import export
from meanet.quantisation import MAX_LOSS, judge
from meanet.routing import Exit, Policy
from meanet.runtime import EdgeRuntime, Images
from meanet.training import build_networks

FASTER = {"onnx": 3.0, "onnx_int8": 6.0}
"""Than eager torch, one image at a time: at least."""
OVERHEAD = 0.05
"""Of a conditional batch, above the blocks' own time: at most."""
BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Measure and write the page."""

    train: str
    """CIFAR-100's training images, as `data.source`."""
    test: str
    """Its test images."""
    evidence: Path = Path("benchmarks/evidence/cifar100_resnet32_b")
    """What a training run left: model.json and edge.safetensors."""
    page: Path = Path("docs/benchmarks/runtime.md")
    """The page."""
    rounds: int = 31
    """Each engine's turns."""
    images: int = 64
    """One by one in a turn."""
    test_images: int = 10_000
    """For accuracy."""


def recorded_model(folder: Path) -> TrainedModel:
    """The recorded run's edge; its cloud network was not kept, and stands here untrained."""
    spec = model_spec.read(folder)
    shape = spec.preprocessing.image_shape
    networks = build_networks(spec.recipe, shape, len(spec.class_names))
    networks.meanet.load_state_dict(load_file(folder / EDGE))
    for part in (networks.meanet, networks.cloud):
        part.eval().requires_grad_(False)
    known = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return TrainedModel(**{**known, "bytes_moved": bytes_moved_of(networks.meanet, shape)}, networks=networks)


def load_splits(model: TrainedModel, flags: Flags) -> Splits:
    """The run's own division.

    Raises:
        UserError: other images.
    """
    config = replace(model.recipe.data, source=flags.train, test_source=flags.test)
    table = data.load(config)
    if table.digest != model.data_digest:
        raise UserError(f"{flags.train} and {flags.test} are not the images that {flags.evidence} was trained on")
    return data.divide(table, config, model.recipe.seed)


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_by_one(runtimes: dict[str, EdgeRuntime], images: Images, policy: Policy, rounds: int) -> dict[str, list[float]]:
    """Seconds an image of each engine, a number a round; the rounds take turns."""

    def turn(runtime: EdgeRuntime) -> None:
        for row in range(len(images)):
            runtime.run(images[row : row + 1], policy)

    found: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(rounds + 1):
        for name, runtime in runtimes.items():
            taken = seconds(lambda runtime=runtime: turn(runtime)) / len(images)
            if number:  # the first is for warming up
                found[name].append(taken)
    return found


@dataclass(frozen=True)
class Conditional:
    """A conditional batch and its parts, seconds a batch, a number a round."""

    whole: list[float]
    main: list[float]
    extension: list[float]
    share: float
    """Of the batch, 0..1, on which the extension block ran."""

    @property
    def overheads(self) -> list[float]:
        """Of each round: time / (time(main) + share x time(extension)) - 1."""
        parts = zip(self.whole, self.main, self.extension, strict=True)
        return [whole / (main + self.share * extension) - 1 for whole, main, extension in parts]


def conditional(engine: EdgeEngine, model: TrainedModel, images: Images, policy: Policy, rounds: int) -> Conditional:
    """Time a batch under the exit rule and each block on the whole batch, in turns."""
    runtime, every = EdgeRuntime(model, engine), np.arange(len(images))
    kept, _ = engine.main(images)
    share = float((runtime.run(images, policy)[0].exit == Exit.EXTENSION).mean())
    found = Conditional([], [], [], share)
    for number in range(rounds + 1):
        taken = (
            seconds(lambda: runtime.run(images, policy)),
            seconds(lambda: engine.main(images)),
            seconds(lambda: engine.extend(kept, every)),
        )
        if number:
            for row, value in zip((found.whole, found.main, found.extension), taken, strict=True):
                row.append(value)
    return found


def spread(values: list[float]) -> tuple[float, float]:
    """The middle half."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


def speed_lines(times: dict[str, list[float]], broken: list[str]) -> list[str]:
    """A line an engine; what is slower than it must be goes into `broken`."""
    lines = ["| engine | ms an image, median (middle half) | times as fast as torch | required |", "|---|---|---|---|"]
    for name, taken in times.items():
        ratios = [torch_s / own for torch_s, own in zip(times["torch"], taken, strict=True)]
        (low, high), (slow, fast) = spread(taken), spread(ratios)
        required = FASTER.get(name)
        if required and median(ratios) < required:
            broken.append(f"{name} is {median(ratios):.2f} times as fast as torch, not {required:g}")
        lines.append(
            f"| {name} | {1e3 * median(taken):.3f} ({1e3 * low:.3f} to {1e3 * high:.3f}) "
            f"| {median(ratios):.2f} ({slow:.2f} to {fast:.2f}) | {f'{required:g}' if required else ''} |"
        )
    return lines


def conditional_lines(found: dict[str, Conditional], broken: list[str]) -> list[str]:
    """A line an engine; overheads above the bound go into `broken`."""
    lines = [
        "| engine | ms a batch | main alone | extension alone | share | overhead, median (middle half) |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        overhead, (low, high) = median(each.overheads), spread(each.overheads)
        if overhead > OVERHEAD:
            broken.append(
                f"a conditional batch of {name} takes {overhead:.1%} more than its blocks, not {OVERHEAD:.0%}"
            )
        whole, main, extension = (1e3 * median(part) for part in (each.whole, each.main, each.extension))
        lines.append(
            f"| {name} | {whole:.2f} | {main:.2f} | {extension:.2f} | {each.share:.2f} "
            f"| {overhead:+.1%} ({low:+.1%} to {high:+.1%}) |"
        )
    return lines


def accuracy_lines(
    model: TrainedModel, folder: Path, splits: Splits, flags: Flags, broken: list[str]
) -> tuple[list[str], Exported]:
    """A line an exit; int8's loss above the bound goes into `broken`."""
    rows = splits.test[: flags.test_images]
    onnx, int8 = (engines.open_edge(folder, name) for name in ("onnx", "onnx_int8"))
    verdict = judge(model, (onnx, int8), splits.table.batches(rows, BATCH), splits.table.labels[rows])
    exported = Exported.read(folder)
    assert exported is not None, "it was exported here"
    assert exported.int8 is not None, "in both forms"
    lines = ["| answers of | images | float32 | int8 | the same answer |", "|---|---|---|---|---|"]
    for split, figures, count in (
        ("validation", exported.int8, exported.int8["validation_images"]),
        ("test", verdict, len(rows)),
    ):
        for name, said in (("main", "the main exit"), ("edge", "the edge alone")):
            each = figures[name]
            lost = each["accuracy_fp32"] - each["accuracy"]
            if lost > MAX_LOSS:
                broken.append(f"int8 loses {100 * lost:.2f} points of {said} on {split}, not {100 * MAX_LOSS:.1f}")
            lines.append(
                f"| {said}, {split} | {count} | {each['accuracy_fp32']:.2%} | {each['accuracy']:.2%} "
                f"| {each['same_answers']:.2%} |"
            )
    return lines, exported


def machine() -> str:
    """What it ran on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    chip = names[0].partition(":")[2].strip() if names else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnx", "numpy"))
    load = os.getloadavg()[0]
    return f"{chip}, {os.cpu_count()} CPUs, one used; Python {platform.python_version()}, {versions}; load {load:.1f}"


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.runtime")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model, broken = recorded_model(flags.evidence), list[str]()
    splits = load_splits(model, flags)
    policy = Policy(hard_classes=model.hard_classes, edge_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(model, Path(scratch) / "model")
        print("exporting", file=sys.stderr)
        export(model, folder, splits, max_loss=1.0)  # timed and judged here, kept or not
        opened = {name: engines.open_edge(folder, name) for name in ("torch", "onnx", "onnx_int8")}
        images = next(splits.table.batches(splits.validation[:: len(splits.validation) // BATCH][:BATCH], BATCH))
        print("timing", file=sys.stderr)
        runtimes = {name: EdgeRuntime(model, engine) for name, engine in opened.items()}
        singles = one_by_one(runtimes, images[: flags.images], policy, flags.rounds)
        batches = {name: conditional(each, model, images, policy, flags.rounds) for name, each in opened.items()}
        print("answering the test split", file=sys.stderr)
        accuracy, exported = accuracy_lines(model, folder, splits, flags, broken)
    speed, shares = speed_lines(singles, broken), conditional_lines(batches, broken)
    assert exported.int8 is not None, "it was asked for"
    flags.page.write_text(
        f"""# Engines of the edge, ResNet-32 B on CIFAR-100

`python -m benchmarks.runtime --train {flags.train} --test {flags.test}`, commit {commit()},
{time.strftime("%Y-%m-%d")}. {machine()}.

The networks are those of [cifar100.md](cifar100.md). {flags.rounds} rounds, in which the engines take turns; a ratio is
of one round, the median is over rounds. All {len(model.hard_classes)} hard classes are in use, nothing is sent up.

## One image at a time

{flags.images} images one by one through `EdgeRuntime.run`, exit rule and all; the extension block runs on
{batches["torch"].share:.0%} or so of them.

{chr(10).join(speed)}

## Conditional batches

{BATCH} images under the exit rule, beside the main block and the extension path on all {BATCH}; the overhead is
time / (time(main) + share x time(extension)) - 1, and may be {OVERHEAD:.0%}.

{chr(10).join(shares)}

## Accuracy

int8 is quantised on {exported.int8["calibration_images"]} training images and kept if it loses {100 * MAX_LOSS:.1f}
points at most on validation, at either exit. The same bound holds here for test, which neither saw.

{chr(10).join(accuracy)}

{chr(10).join(f"**Not kept: {each}.**" for each in broken) or "Every bound is kept."}
"""
    )
    print(flags.page.read_text())
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
