"""The demo over five seeds: `make bench`, or `python -m benchmarks.digits_seeds` -> docs/benchmarks/digits.md.

Each seed is a whole `jobs.demo digits`: its own division of the data, weights, classes, operating point and server.
Seed 0 is run twice, to show that the same seed gives the same result. Exit status 1 where a bound is not kept.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

_POLICIES = ("main_only", "edge_only", "authors_threshold", "operating_point", "cloud_only", "oracle")
_SUMMARISED = (*_POLICIES, "sedna_filter", "random")
_REPEATED = ("hard_classes", "operating_point", "policies", "routing_efficiency")


@dataclass(frozen=True)
class Flags:
    """Run the demo for each seed and write the table."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds."""
    output: Path = Path("docs/benchmarks/digits.md")
    """The page."""
    reports: Path | None = None
    """Keep each seed's report.json below this folder."""


def run_demo(seed: int, folder: Path) -> dict[str, Any]:
    """One demo in a process of its own; its report without the run's ids."""
    command = [sys.executable, "-m", "jobs.demo", "digits", "--seed", str(seed), "--output", str(folder), "--json"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"}
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    report: dict[str, Any] = json.loads(done.stdout)
    report["wall_seconds"] = time.perf_counter() - started
    report["operating_point"].pop("run")
    return report


def _row(report: dict[str, Any]) -> str:
    policies = report["policies"]
    point, cloud = policies["operating_point"], policies["cloud_only"]
    joules = [1e6 * sum(policy["joules"].values()) for policy in (point, cloud)]
    shares = " / ".join(f"{point['share'][name]:.1%}" for name in ("main", "extension", "cloud"))
    accuracy = " | ".join(f"{policies[name]['accuracy']:.2%}" for name in _POLICIES)
    hard = " -> ".join(f"{policies[name]['accuracy_hard_classes']:.2%}" for name in ("main_only", "edge_only"))
    loss = 100 * (cloud["accuracy"] - point["accuracy"])
    return (
        f"| {report['seed']} | {accuracy} | {loss:+.2f} | {shares} | {hard} | {joules[0]:.1f} / {joules[1]:.1f} "
        f"| {report['http']['mismatches']} of {report['http']['images']} | {report['wall_seconds']:.0f} |"
    )


def _spread(values: list[float], unit: str = "%") -> str:
    scale = 100 if unit == "%" else 1
    return f"{scale * statistics.mean(values):.2f} ± {scale * statistics.stdev(values):.2f} {unit}"


def _summary(reports: list[dict[str, Any]]) -> list[str]:
    def of(policy: str, key: str = "accuracy") -> list[float]:
        return [report["policies"][policy][key] for report in reports]

    def share(name: str) -> list[float]:
        return [report["policies"]["operating_point"]["share"][name] for report in reports]

    losses = [cloud - point for cloud, point in zip(of("cloud_only"), of("operating_point"), strict=True)]
    joules = [
        sum(report["policies"]["operating_point"]["joules"].values())
        / sum(report["policies"]["cloud_only"]["joules"].values())
        for report in reports
    ]
    efficiency = [report["routing_efficiency"] for report in reports if report["routing_efficiency"] is not None]
    return [
        *(f"- {name.replace('_', ' ')}: accuracy {_spread(of(name))}" for name in _SUMMARISED),
        f"- cascade below cloud-only: {_spread(losses)} (points; worst {100 * max(losses):.2f})",
        *(f"- answered by {name}: {_spread(share(name))}" for name in ("main", "extension", "cloud")),
        f"- hard classes: main only {_spread(of('main_only', 'accuracy_hard_classes'))}, "
        f"edge only {_spread(of('edge_only', 'accuracy_hard_classes'))}",
        f"- modelled energy of the device, cascade / cloud-only: {_spread(joules)}",
        f"- routing efficiency: {_spread(efficiency, '')}".rstrip(),
        f"- one whole demo: {_spread([report['wall_seconds'] for report in reports], 's')}",
    ]


def breaches(reports: list[dict[str, Any]]) -> list[str]:
    """Which of the bounds on the means over seeds, and on each seed, are not kept."""

    def mean(policy: str, key: str = "accuracy") -> float:
        return statistics.mean(report["policies"][policy][key] for report in reports)

    cloud_share = statistics.mean(report["policies"]["operating_point"]["share"]["cloud"] for report in reports)
    kept = {
        "main only at 0.85 or more": mean("main_only") >= 0.85,
        "the cascade within 0.5 points of cloud-only": mean("cloud_only") - mean("operating_point") <= 0.005,
        "at most 35% of the images to the cloud": cloud_share <= 0.35,
        "edge only above main only on hard classes": mean("edge_only", "accuracy_hard_classes")
        > mean("main_only", "accuracy_hard_classes"),
    }
    for report in reports:
        point, cloud, seed = report["policies"]["operating_point"], report["policies"]["cloud_only"], report["seed"]
        kept |= {
            f"seed {seed}: all three exits answer": min(point["share"].values()) > 0,
            f"seed {seed}: within 1.5 points of cloud-only": cloud["accuracy"] - point["accuracy"] <= 0.015,
            f"seed {seed}: less energy than cloud-only": sum(point["joules"].values()) < sum(cloud["joules"].values()),
            f"seed {seed}: over HTTP as in the table": report["http"]["mismatches"] == 0,
        }
    return [name for name, holds in kept.items() if not holds]


def page(reports: list[dict[str, Any]], repeated: bool) -> str:
    """The table, mean and spread, and where they were measured."""
    names = ("ray", "torch", "mlflow", "numpy", "scikit-learn")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    head = (
        "| seed | main only | edge only | authors' threshold | **cascade** | cloud only | oracle | points below cloud "
        "| main / extension / cloud | hard classes: main only -> edge only | µJ cascade / cloud only "
        "| HTTP answers unlike the table | s |"
    )
    rule = "|" + "---|" * (head.count("|") - 1)
    same = "the same report, number for number" if repeated else "ANOTHER report: not repeatable"
    return "\n".join(
        [
            "# Digits over five seeds",
            "",
            f"`python -m benchmarks.digits_seeds`, {time.strftime('%Y-%m-%d')}, commit {reports[0]['commit']}, "
            f"{os.cpu_count()} CPUs ({platform.machine()}, {platform.system()}), Python {platform.python_version()}, "
            f"{versions}.",
            "",
            f"Test split ({reports[0]['samples']} images), on which nothing was chosen; a seed changes the division of "
            "the data, the weights and the order of samples. The operating point is the cheapest that is, with 95% "
            "confidence on validation, within 0.5 points of cloud-only. The recipe itself was chosen on validation "
            "splits of other seeds, which divide the same 1,797 images: single images of a test split were seen there.",
            "",
            head,
            rule,
            *(_row(report) for report in reports),
            "",
            "Mean ± standard deviation over seeds:",
            "",
            *_summary(reports),
            "",
            f"Bounds not kept: {'; '.join(breaches(reports)) or 'none'} (`breaches` in this benchmark lists them all).",
            "",
            f"Seed {reports[0]['seed']} run twice gave {same} (hard classes, operating point, every policy's figures).",
            "",
        ]
    )


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.digits_seeds")
    with tempfile.TemporaryDirectory() as scratch:
        reports = [run_demo(seed, Path(scratch) / str(seed)) for seed in flags.seeds]
        again = run_demo(flags.seeds[0], Path(scratch) / "again")
    for report in reports if flags.reports else []:
        assert flags.reports is not None, "checked above"
        flags.reports.mkdir(parents=True, exist_ok=True)
        (flags.reports / f"digits-{report['seed']}.json").write_text(json.dumps(report, indent=2))
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    repeated = all(again[key] == reports[0][key] for key in _REPEATED)
    flags.output.write_text(page(reports, repeated))
    print(flags.output.read_text())
    if breaches(reports) or not repeated:
        sys.exit(1)


if __name__ == "__main__":
    main()
