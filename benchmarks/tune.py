"""Studies against random search: `python -m benchmarks.tune` -> docs/benchmarks/tuning.md.

`jobs.tune class_split` on digits, Optuna's and random proposals with the same number of trials, on the same default,
for each seed; with `--source parquet:...` also one study of each on a slice of that set. Nothing is asserted.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

_SEARCHERS = ("optuna", "random")


@dataclass(frozen=True)
class Flags:
    """Run the studies and write the page."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the digits studies; none leaves them out."""
    trials: int = 16
    """Of each study."""
    source: str | None = None
    """`parquet:PATH` of a set to take a slice of (CIFAR-100 in the hubs' layout); no such study if not given."""
    images: int = 6000
    """Of the slice, class by class in the set's own shares."""
    recipe: str = "cifar100_resnet32_b_fast"
    """Of the slice's study."""
    slice_trials: int | None = None
    """Of each study on the slice; as `trials` if not given."""
    slice_flags: str = "--main.epochs 12 --extension.epochs 8 --cloud.epochs 6"
    """Further flags of the slice's studies, in one word: `--slice-flags="--main.epochs 12"`."""
    output: Path = Path("docs/benchmarks/tuning.md")
    """The page."""
    keep: Path | None = None
    """Keep the studies' folders here; the same command then goes on after an interruption."""
    digits_flags: str = ""
    """Further flags of the digits studies, likewise, to try things out."""


def study(words: list[str], folder: Path) -> dict[str, Any]:
    """One `jobs.tune` in a process of its own; its report, with the time that it took."""
    done = folder / "benchmark.json"
    if done.exists():
        report: dict[str, Any] = json.loads(done.read_text())
        return report
    command = [sys.executable, "-m", "jobs.tune", *words, "--output", str(folder), "--json"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"}
    started = time.perf_counter()
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    report = json.loads(finished.stdout)
    report["wall_seconds"] = time.perf_counter() - started
    done.write_text(json.dumps(report))
    return report


def pair(words: list[str], trials: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The same study by both searchers, on one default."""
    reports = {}
    for searcher in _SEARCHERS:
        own = [*words, "--trials", str(trials), "--searcher", searcher]
        base = [] if searcher == _SEARCHERS[0] else ["--base", str(folder / _SEARCHERS[0] / "base")]
        reports[searcher] = study([*own, *base], folder / searcher)
    return reports


def write_slice(source: str, images: int, path: Path) -> Path:
    """A Parquet file with so many rows of a set, in each class's share, and its own metadata."""
    whole = pq.read_table(source.removeprefix("parquet:"))
    integers = [name for name in whole.column_names if pa.types.is_integer(whole.schema.field(name).type)]
    name = "fine_label" if "fine_label" in integers else "label" if "label" in integers else integers[0]
    labels, generator = whole[name].to_numpy(), np.random.default_rng(0)
    classes = np.unique(labels)
    rows = [
        generator.permutation(np.flatnonzero(labels == one))[: max(1, round(images * (labels == one).mean()))]
        for one in classes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(whole.take(np.sort(np.concatenate(rows))), path)
    return path


def _ratio(reports: dict[str, dict[str, Any]]) -> float:
    ours, random = (reports[searcher]["hypervolume"]["final"] for searcher in _SEARCHERS)
    return float(ours / random) if random else float("nan")


def _row(name: str, reports: dict[str, dict[str, Any]]) -> str:
    cells = []
    for searcher in _SEARCHERS:
        report = reports[searcher]
        gain = report["gain"]
        by_trial = report["hypervolume"]["by_trial"]
        gained = (
            f"{100 * gain['accuracy']:+.2f} points, {gain['joules_share']:.0%} of joules" if gain["dominates"] else "no"
        )
        cells += [
            f"{by_trial[-1]:.4f} (default {default_hypervolume(report):.4f})",
            f"{report['trials']['finished']} + {report['trials']['stopped']}",
            gained,
            f"{report['wall_seconds']:.0f}",
        ]
    return f"| {name} | {' | '.join(cells)} | {_ratio(reports):.4f} |"


def default_hypervolume(report: dict[str, Any]) -> float:
    """Of the default's front alone."""
    from meanet.study import Reference

    front = report["default"]["front"]
    accuracy, joules = (np.array([point[key] for point in front]) for key in ("accuracy", "joules"))
    return Reference(**report["reference"]).hypervolume(accuracy, joules)


def _table(rows: list[str]) -> list[str]:
    columns = [
        f"{searcher}: {name}"
        for searcher in _SEARCHERS
        for name in ("hypervolume", "trials finished + stopped", "dominates the default", "s")
    ]
    head = f"| | {' | '.join(columns)} | optuna / random |"
    return [head, "|" + "---|" * (head.count("|") - 1), *rows]


def _verdict(ratios: list[float]) -> str:
    shown = ", ".join(f"{ratio:.4f}" for ratio in ratios)
    mean = statistics.mean(ratios)
    better = sum(ratio > 1 for ratio in ratios)
    words = "better than" if mean > 1.001 else "no better than" if mean < 1.001 and mean > 0.999 else "worse than"
    return (
        f"Final hypervolume, Optuna's / random search's: {shown}; mean {mean:.4f}, above 1 in {better} of "
        f"{len(ratios)}: on the whole {words} random search."
    )


def page(digits: dict[int, dict[str, Any]], slice_: dict[str, Any] | None, flags: Flags) -> str:
    """The tables, and where they were measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna", "torch", "numpy"))
    some: dict[str, Any] = next(iter(digits.values())) if digits else (slice_ or {})
    lines = [
        "# Studies on Ray Tune",
        "",
        f"`python -m benchmarks.tune`, {time.strftime('%Y-%m-%d')}, commit {some['optuna']['commit']}, "
        f"{os.cpu_count()} CPUs ({platform.machine()}, {platform.system()}), Python {platform.python_version()}, "
        f"{versions}.",
        "",
        "`jobs.tune class_split`: size and choice of the hard classes, main block and cloud shared by all trials. Both "
        "searchers begin with the default and may try as many configurations; no configuration twice. Hypervolume: of "
        "the union front on validation, as a share of the rectangle from the default's main block alone to right "
        "answers for nothing. Fronts and hypervolumes are validation's, on which they were chosen; figures on test: "
        "`report.json` of a study. Wall time of optuna's studies includes the training of the default, which random "
        "search's then use.",
        "",
    ]
    if digits:
        lines += [f"## Digits, {flags.trials} trials", ""]
        lines += _table([_row(f"seed {seed}", reports) for seed, reports in digits.items()])
        lines += ["", _verdict([_ratio(reports) for reports in digits.values()]), ""]
        lines += [f"- seed {seed}: {reports['optuna']['summary']}" for seed, reports in digits.items()]
        lines += [""]
    if slice_:
        lines += [f"## {flags.images} images, {flags.recipe}, {flags.slice_trials or flags.trials} trials", ""]
        lines += [f"Flags: `{flags.slice_flags}`.", "", *_table([_row("seed 0", slice_)])]
        lines += ["", _verdict([_ratio(slice_)]), "", slice_["optuna"]["summary"], ""]
    return "\n".join(lines)


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.tune")
    with tempfile.TemporaryDirectory() as scratch:
        root = (flags.keep or Path(scratch)).absolute()
        digits = {
            seed: pair(
                ["class_split", "digits", "--seed", str(seed), *shlex.split(flags.digits_flags)],
                flags.trials,
                root / f"digits-{seed}",
            )
            for seed in flags.seeds
        }
        slice_ = None
        if flags.source:
            path = write_slice(flags.source, flags.images, root / f"slice-{flags.images}.parquet")
            data = ["--data.source", f"parquet:{path}", "--data.validation-fraction", "0.25"]
            words = [
                "class_split",
                flags.recipe,
                *data,
                "--data.test-fraction",
                "0.15",
                *shlex.split(flags.slice_flags),
            ]
            slice_ = pair(words, flags.slice_trials or flags.trials, root / "slice")
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(page(digits, slice_, flags))
    print(flags.output.read_text())


if __name__ == "__main__":
    main()
