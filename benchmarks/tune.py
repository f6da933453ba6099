"""Studies against random search: `python -m benchmarks.tune` -> docs/benchmarks/tuning.md.

`jobs.tune class_split` on digits, Optuna's and random proposals with the same number of trials, on the same default,
for each seed; with `--base FOLDER` also one study of each on that run, whose trials train on a slice. Nothing is
asserted.
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
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import t

from meanet.study import FrontPoint, Reference, gain

_SEARCHERS = ("optuna", "random")


@dataclass(frozen=True)
class Flags:
    """Run the studies and write the page."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the digits studies; none leaves them out."""
    trials: int = 16
    """Of each study."""
    base: Path | None = None
    """A finished run (docs/benchmarks/cifar100.md): also one study of each searcher on it, whose trials train on
    a slice; no such study if not given."""
    recipe: str = "cifar100_resnet32_b_fast"
    """Of that run."""
    base_flags: str = ""
    """That run's own flags, in one word: `--base-flags="--main.epochs 8"`."""
    slice_flags: str = "--extension.epochs 4 --extension.max-steps 50"
    """The slice: further flags of these studies, likewise."""
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


def pair(words: list[str], trials: int, folder: Path, base: Path | None = None) -> dict[str, dict[str, Any]]:
    """The same study by both searchers, on one default: the given run's, or that of the first study."""
    reports = {}
    for searcher in _SEARCHERS:
        own = [*words, "--trials", str(trials), "--searcher", searcher]
        if base or searcher != _SEARCHERS[0]:
            own += ["--base", str(base or folder / _SEARCHERS[0] / "base")]
        reports[searcher] = study(own, folder / searcher)
    return reports


def _ratio(reports: dict[str, dict[str, Any]]) -> float:
    ours, random = (reports[searcher]["hypervolume"]["final"] for searcher in _SEARCHERS)
    return float(ours / random) if random else float("nan")


def _row(name: str, reports: dict[str, dict[str, Any]]) -> str:
    """Both studies against the default's front, which is the same trial in both: one may have stopped it early."""
    default = next(front for report in reports.values() if (front := report["default"]["front"]))
    cells = []
    for searcher in _SEARCHERS:
        report = reports[searcher]
        found = gain(_points(report["union_front"]), _points(default))
        gained = f"{100 * found.accuracy:+.2f} points, {found.joules_share:.0%} of joules" if found.dominates else "no"
        cells += [
            f"{report['hypervolume']['final']:.4f} (default {_hypervolume(default, report):.4f})",
            f"{report['trials']['finished']} + {report['trials']['stopped']}",
            gained,
            f"{report['wall_seconds']:.0f}",
        ]
    return f"| {name} | {' | '.join(cells)} | {_ratio(reports):.4f} |"


def _points(rows: list[dict[str, Any]]) -> list[FrontPoint]:
    names = [field.name for field in fields(FrontPoint)]
    return [FrontPoint(**{name: row[name] for name in names}) for row in rows]


def _hypervolume(front: list[dict[str, Any]], report: dict[str, Any]) -> float:
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
    """Better only where 1 lies below the 95% interval of the mean over seeds (Student's t)."""
    shown = ", ".join(f"{ratio:.4f}" for ratio in ratios)
    if len(ratios) < 2:
        return f"Final hypervolume, Optuna's / random search's: {shown}. One study says no more than that."
    mean, error = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    reach = float(t.ppf(0.975, len(ratios) - 1)) * error
    words = "better than" if mean - 1 > reach else "worse than" if 1 - mean > reach else "no better than"
    return (
        f"Final hypervolume, Optuna's / random search's: {shown}; mean {mean:.4f}, standard error {error:.4f}: on the "
        f"whole **{words} random search** with the same budget."
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
        lines += [
            f"## CIFAR-100, each trial on a slice, {flags.trials} trials",
            "",
            "The default's main block and cloud are those of [cifar100.md](cifar100.md), 5,000 images to choose on; a "
            f"trial trains extension and adaptive blocks on a slice of the 45,000 (`{flags.slice_flags}`). Commit "
            f'{slice_["optuna"]["commit"]}, `--base outputs/cifar100 --base-flags="..."` with that run\'s own flags.',
            "",
            *_table([_row("seed 0", slice_)]),
            "",
            _verdict([_ratio(slice_)]),
            "",
            slice_["optuna"]["summary"],
            "",
        ]
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
        if flags.base:
            words = ["class_split", flags.recipe, *shlex.split(flags.base_flags), *shlex.split(flags.slice_flags)]
            slice_ = pair(words, flags.trials, root / "slice", flags.base.absolute())
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(page(digits, slice_, flags))
    print(flags.output.read_text())


if __name__ == "__main__":
    main()
