"""The exact sweep, measured: `python -m benchmarks.sweep` -> docs/benchmarks/sweep.md and its plots.

1. CPU of 10,000 samples x every threshold x 100 split sizes, and a thousand of those points recomputed one by one.
2. Growth from a thousand samples to a million.
3. On a recorded exits table: what 30 and 1,000 trials, random and Optuna's, lose in accuracy at equal energy.
4. On the same table: operating points over three links.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import tyro
from matplotlib.figure import Figure
from scipy.special import entr, softmax

from jobs._cli import commit
from meanet.config import EnergyConfig, OperatingPointConfig
from meanet.edges import UNSCALED, Recorded
from meanet.energy import CostModel, Macs, cost_model
from meanet.evaluation import ExitsTable
from meanet.fronts import pareto_front
from meanet.operating_point import search, sweep
from meanet.plots import save_png
from meanet.replay import Exits, Outcome, Replayer
from meanet.routing import MEASURES, Floats, Policy, complexity, read_main
from meanet.thresholds import GateSums, Points, midway, sweep_gate

COSTS = cost_model(EnergyConfig(), Macs(main=69_130_000, adaptive=12_500_000, extension=21_760_000, cloud=556_000_000))
"""ResNet-32 B over WiFi."""
CLASSES = 100
LINKS = ("wired", "wifi", "lte")


@dataclass(frozen=True)
class Flags:
    """Measure and write the page."""

    exits: Path = Path("benchmarks/evidence/cifar100_resnet32_b/exits.parquet")
    """A recorded exits table."""
    page: Path = Path("docs/benchmarks/sweep.md")
    """The page; plots go beside it."""
    samples: tuple[int, ...] = (1_000, 3_162, 10_000, 31_623, 100_000, 316_228, 1_000_000)
    """Sizes for the growth."""
    rounds: int = 7
    """Repetitions of each timing up to 100,000 samples; three above."""
    seeds: int = 3
    """Of the sampled searches."""


def synthetic(count: int, seed: int = 0) -> Exits:
    """Random logits of 100 classes that know something of the labels; all classes hard."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    hard = generator.permutation(CLASSES)
    column = np.argsort(hard)[labels]
    main = generator.standard_normal((count, CLASSES), dtype=np.float32)
    extension = generator.standard_normal((count, CLASSES), dtype=np.float32)
    main[np.arange(count), labels] += 2.5
    extension[np.arange(count), column] += 4
    cloud = np.where(generator.random(count) < 0.8, labels, generator.integers(0, CLASSES, count))
    return Exits(labels, main, extension, cloud, generator.integers(1500, 3000, count), tuple(hard.tolist()))


def front_of(exits: Exits) -> tuple[int, Points]:
    """What is timed: logits in memory -> how many points were compared, and the accuracy-joules front."""
    compared, points = sweep_gate(Recorded(exits, COSTS), "main_entropy", range(1, CLASSES + 1), front_only=True)
    return compared, pareto_front(points)


def cpu_ms(work: Callable[[], Any], rounds: int) -> list[float]:
    """CPU time of this process, ms, each time."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started))
    return times


def by_loop(exits: Exits, costs: CostModel, threshold: float, size: int) -> tuple[int, float]:
    """One point the straightforward way, with nothing of ours but the costs: right answers and joules, summed."""
    p = softmax(exits.main_logits.astype(np.float64), axis=1)
    main, gone = p.argmax(axis=1), entr(p).sum(axis=1) > threshold
    classes = np.array(exits.hard_classes[:size])
    q = softmax(exits.extension_logits[:, :size].astype(np.float64), axis=1)
    hard = np.isin(main, classes) & ~gone
    extension = hard & ~(p.max(axis=1) > q.max(axis=1))
    answer = np.where(gone, exits.cloud_pred, np.where(extension, classes[q.argmax(axis=1)], main))
    joules = costs.main_joules + hard * costs.extension_joules + gone * costs.upload_joules(exits.upload_bytes)
    return int((answer == exits.labels).sum()), float(joules.sum())


def mismatches(exits: Exits, costs: CostModel, count: int, seed: int = 1) -> int:
    """How many of `count` random points of the sweep differ from the loop in right answers or (beyond 1e-9) joules."""
    generator, recorded = np.random.default_rng(seed), Recorded(exits, costs)
    sizes = range(1, len(exits.hard_classes) + 1)
    wanted = np.bincount(generator.integers(0, len(sizes), count), minlength=len(sizes))
    cloud_right, wrong = int(recorded.cloud_right.sum()), 0
    for size, sums in GateSums(recorded, "main_entropy", sizes):
        for prefix in generator.choice(sums.kept, wanted[size - 1], replace=False):
            threshold = float(midway(sums.score, np.array([prefix]))[0])
            right, joules = by_loop(exits, costs, threshold, size)
            ours = costs.main_joules * exits.num_samples + sums.joules[prefix]
            wrong += right != cloud_right - sums.lost[prefix] or abs(joules / ours - 1) > 1e-9
    return wrong


def exact(flags: Flags) -> list[str]:
    """Parts 1 and 2."""
    exits = synthetic(10_000)
    compared, front = front_of(exits)
    times = cpu_ms(lambda: front_of(exits), 3 * flags.rounds)
    wrong = mismatches(exits, COSTS, 1000)
    lines = [
        f"10,000 samples x every threshold x 100 split sizes = {compared:,} points, gate main entropy: "
        f"**{median(times):.1f} ms of CPU** (median of {len(times)}, {min(times):.1f} to {max(times):.1f}), from "
        f"logits in memory to the accuracy-joules front of {len(front)} points. Of 1,000 random points recomputed one "
        f"by one, **{wrong} differ**.",
        "",
        "| samples | points | CPU ms (median) | lowest | highest |",
        "|---|---|---|---|---|",
    ]
    medians = []
    for count in flags.samples:
        exits = synthetic(count)
        times = cpu_ms(lambda exits=exits: front_of(exits), flags.rounds if count <= 100_000 else 3)  # type: ignore[misc]
        medians.append(median(times))
        lines.append(
            f"| {count:,} | {100 * (count + 1):,} | {median(times):.1f} | {min(times):.1f} | {max(times):.1f} |"
        )
    logs = np.log(flags.samples), np.log(medians)
    overall = float(np.polyfit(*logs, 1)[0])
    steps = np.diff(logs[1]) / np.diff(logs[0])
    lines += [
        "",
        f"Growth: log-log exponent **{overall:.2f}** over the whole range (between neighbours {steps.min():.2f} to "
        f"{steps.max():.2f}).",
    ]
    return lines


class Sampled:
    """A search by trials of the gates that the sweep enumerates: gate, split size, share that stays on the edge."""

    def __init__(self, exits: Exits, costs: CostModel) -> None:
        self.replayer, self.exits = Replayer(exits, costs), exits
        main = read_main(exits.main_logits, Policy())
        self._scores = {measure: np.sort(complexity(main, measure)) for measure in MEASURES}
        self.rows: list[tuple[float, float, Policy]] = []

    def suggest(self, trial: optuna.trial.BaseTrial) -> tuple[float, float]:
        """One trial's accuracy and joules."""
        measure: Any = trial.suggest_categorical("measure", MEASURES)
        size = trial.suggest_int("split_size", 0, len(self.exits.hard_classes))
        score = self._scores[measure]
        stays = trial.suggest_float("stays", 0.0, 1.0)
        finite = score[np.isfinite(score)]
        policy = Policy(measure, (float(np.quantile(finite, stays)),), self.exits.hard_classes[:size])
        outcome = self.replayer.replay(policy)
        self.rows.append((outcome.accuracy, outcome.total_joules, policy))
        return outcome.accuracy, outcome.total_joules


def trials(exits: Exits, costs: CostModel, sampler: str, count: int, seed: int) -> Sampled:
    """A study of so many trials."""
    choices = {"random": optuna.samplers.RandomSampler, "Optuna TPE": optuna.samplers.TPESampler}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=choices[sampler](seed=seed))
    sampled = Sampled(exits, costs)
    study.optimize(sampled.suggest, n_trials=count)
    return sampled


def lost(sampled: Sampled, levels: Floats, ours: Floats, ours_test: Floats, on_test: Replayer) -> tuple[Floats, Floats]:
    """At each level of joules that some trial keeps, how far the best lies below ours, on validation and on test."""
    accuracy, joules = (np.array(column) for column in list(zip(*sampled.rows, strict=True))[:2])
    below, below_test = [], []
    for level, own, own_test in zip(levels, ours, ours_test, strict=True):
        within = joules <= level
        if within.any():
            best = int(np.argmax(np.where(within, accuracy, -1.0)))
            below.append(own - accuracy[best])
            below_test.append(own_test - on_test.replay(sampled.rows[best][2]).accuracy)
    return np.array(below), np.array(below_test)


def versus(table: ExitsTable, flags: Flags) -> list[str]:
    """Part 3."""
    validation, test, costs = table.exits("validation"), table.exits("test"), table.costs
    started = time.process_time()
    swept = sweep(validation, costs, MEASURES)
    front = pareto_front(swept.points)
    seconds = time.process_time() - started
    levels = np.linspace(front.joules.min(), front.joules.max(), 51)[1:]
    found = search(table, table.operating_point, MEASURES)
    on_test = Replayer(test, costs)
    place = [np.flatnonzero(front.joules <= level)[-1] for level in levels]
    ours = front.accuracy[place]
    ours_test = np.array([on_test.replay(found.policy(front, row, table)).accuracy for row in place])
    lines = [
        f"The sweep compares {swept.compared:,} policies (four gates, raw logits, split sizes 0 to "
        f"{len(table.hard_classes)}) on {validation.num_samples:,} validation images in {seconds:.2f} s of CPU. Lost: "
        "how far the best trial within an energy lies below the front, in points of accuracy, over 50 energies from "
        "the cheapest to the dearest of the front; means over seeds, in brackets the worst seed's. An energy that no "
        "trial keeps is counted and left out of the losses.",
        "",
        "| search | trials | CPU s | energies without a trial | lost on validation, mean | at most | on test, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for sampler in ("random", "Optuna TPE"):
        for count in (30, 1000):
            rows = []
            for seed in range(flags.seeds):
                started = time.process_time()
                sampled = trials(validation, costs, sampler, count, seed)
                cpu = time.process_time() - started
                below, below_test = lost(sampled, levels, ours, ours_test, on_test)
                missing = len(levels) - len(below)
                rows.append((cpu, missing, 100 * below.mean(), 100 * below.max(), 100 * below_test.mean()))
            columns = np.array(rows).T
            cells = [f"{column.mean():.2f} ({column.max():.2f})" for column in columns[1:]]
            lines.append(f"| {sampler} | {count} | {columns[0].mean():.1f} | {' | '.join(cells)} |")
    return lines


BOUNDS = {
    "within 2 points of cloud-only, cheapest": OperatingPointConfig(max_accuracy_loss_vs_cloud=0.02),
    "within 2 mJ an image, most accurate": OperatingPointConfig(max_accuracy_loss_vs_cloud=None, max_energy=0.002),
}


def over_links(table: ExitsTable, flags: Flags) -> list[str]:
    """Part 4."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [
        "| asked for | link | J an upload (mean) | gate | hard classes used | main | extension | cloud | accuracy "
        "| below cloud-only | mJ an image |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = table.energy
    for link in LINKS:
        table.energy = replace(own, link=link)
        on_test = Replayer(table.exits("test"), table.costs)
        for (asked, bound), marker in zip(BOUNDS.items(), "*o", strict=True):
            found = search(table, bound, (*MEASURES, "two_gate"), scaled=True)
            policy = Policy.from_dict(found.chosen)
            point = on_test.replay(policy)
            if marker == "*":
                front = pareto_front(found.front)
                rows = [on_test.replay(found.policy(front, row, table)) for row in range(len(front))]
                joules, accuracy = [1e3 * row.total_joules for row in rows], [row.accuracy for row in rows]
                (line,) = axes.plot(joules, accuracy, "-", label=link)
            axes.plot([1e3 * point.total_joules], [point.accuracy], marker, ms=11, mec="black", color=line.get_color())
            lines.append(f"| {asked} | {link} | {_described(table, policy, point)} |")
    axes.set(xscale="log", xlabel="energy of the edge device, mJ an image", ylabel="accuracy (test)")
    axes.set_title("Fronts over three links; star: within 2 points of cloud-only; dot: within 2 mJ", fontsize=10)
    axes.legend()
    folder = flags.page.parent / flags.page.stem
    folder.mkdir(parents=True, exist_ok=True)
    save_png(figure, folder / "links.png")
    return [*lines[:2], *_by_bound(lines[2:])]


def _by_bound(rows: list[str]) -> list[str]:
    return [row for asked in BOUNDS for row in rows if row.startswith(f"| {asked} ")]


def _described(table: ExitsTable, policy: Policy, point: Outcome) -> str:
    shares = " | ".join(f"{point.share[exit_]:.1%}" for exit_ in ("main", "extension", "cloud"))
    upload = float(np.mean(table.costs.upload_joules(table.exits("test").upload_bytes)))
    gate = policy.gate + (f" ({', '.join(policy.measures)})" if policy.gate == "two_gate" else "")
    scaled = ", scaled" if policy.temperatures != UNSCALED else ""
    test = table.exits("test")
    loss = float((test.cloud_pred == test.labels).mean()) - point.accuracy
    figures = f"{point.accuracy:.2%} | {100 * loss:.2f} points | {1e3 * point.total_joules:.3f}"
    return f"{upload:.3g} | {gate}{scaled} | {len(policy.hard_classes)} | {shares} | {figures}"


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = ExitsTable.read(flags.exits)
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "optuna"))
    nl = "\n"
    text = f"""# The exact sweep

`python -m benchmarks.sweep`, at commit {commit()}, {time.strftime("%Y-%m-%d")}; {os.cpu_count()} CPUs
({platform.machine()}), Python {platform.python_version()}, {versions}. One thread; CPU time of the process.

## A million points

{nl.join(exact(flags))}

## Against search by trials

On {flags.exits}, over {table.costs.tag}.

{nl.join(versus(table, flags))}

## Three links

Chosen on validation, with 95% confidence where accuracy is bounded; figures on test. Over a wire an upload costs a
third of the extension block: what main is not sure of is sent. Over the radio an upload costs tens of times that block,
and where accuracy is fixed the policy that uploads least is the cheapest, over WiFi as over LTE; where the energy is
fixed, the dearer link leaves less of it to send with. (The confidence is each policy's by itself: the cheapest of many
that pass may lie beyond its bound on test, as the column below cloud-only shows.)

{nl.join(over_links(table, flags))}

![Fronts over three links]({flags.page.stem}/links.png)
"""
    flags.page.parent.mkdir(parents=True, exist_ok=True)
    flags.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
