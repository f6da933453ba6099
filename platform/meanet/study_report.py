"""What a study says of itself: `report.json`, the union front as CSV, a page and its figures. Chosen on validation."""

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meanet import plots
from meanet.config import OperatingPointConfig
from meanet.errors import UserError
from meanet.replay import Outcome
from meanet.storage import write_text
from meanet.study import (
    Choice,
    Domain,
    FloatRange,
    FrontPoint,
    Gain,
    Reference,
    Space,
    Trial,
    UnionPoint,
    Value,
    gain,
    hypervolumes,
    union_front,
)

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MEANet study: $space of $recipe</title>
<style>$style</style></head><body>
<h1>Study <code>$space</code> of recipe <code>$recipe</code>, seed $seed</h1>
<p>$summary</p>
<div class="plots">$plots</div>
<h2>Trials, on validation</h2>
$table
<p class="note">Joules are the edge device's, per image. Hypervolume: the share of the rectangle from the default's main
block alone to right answers for nothing that a front dominates. The chosen trial's operating point is the best of all
that keep the recipe's constraint on validation.</p>
</body></html>
""")


@dataclass(frozen=True)
class Facts:
    """Of a study, beside its trials."""

    space: Space
    recipe: str
    """Name."""
    seed: int
    searcher: str
    """optuna or random."""
    commit: str
    """Of the code; `unknown` outside a checkout."""
    reference: Reference
    default: tuple[FrontPoint, ...]
    """The front to beat: the default trial's, or every one-gate policy's."""
    default_name: str
    """What that front is, in words."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Trial -> what it failed with."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by stage."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> path of what the study wrote."""


@dataclass(frozen=True)
class Chosen:
    """The trial whose operating point is the best."""

    trial: Trial
    operating_point: dict[str, Any]
    test: Outcome
    """Of that point, on the test split."""
    default_test: Outcome
    """Of the default's operating point, on the test split."""


def best_trial(trials: Sequence[Trial], constraint: OperatingPointConfig) -> Trial:
    """The finished trial whose operating point is the best on validation, by what the constraint leaves to make best.

    Raises:
        UserError: no trial keeps the constraint.
    """

    def rank(trial: Trial) -> tuple[float, float]:
        assert trial.operating_point is not None, "others are left out"
        expected = trial.operating_point["expected"]
        joules, lost = sum(expected["joules"].values()), -expected["accuracy"]
        return (joules, lost) if constraint.bounds_accuracy else (lost, joules)

    able = [trial for trial in trials if trial.operating_point is not None]
    if not able:
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in constraint.bounds.items())
        raise UserError(
            f"no policy of any of the {len(trials)} trials keeps {bounds} with {constraint.confidence:.0%} confidence: "
            "loosen the bound (--operating-point....); what was trained is kept"
        )
    return min(able, key=rank)


def build(trials: Sequence[Trial], facts: Facts, chosen: Chosen) -> dict[str, Any]:
    """The content of `report.json`."""
    union = union_front(trials)
    over = gain([one.point for one in union], facts.default)
    by_trial = hypervolumes([trial for trial in trials if trial.state == "finished"], facts.reference)
    report = {
        "space": facts.space.name,
        "recipe": facts.recipe,
        "seed": facts.seed,
        "searcher": facts.searcher,
        "commit": facts.commit,
        "split": "validation",
        "trials": {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped")},
        "failed": dict(facts.failed),
        "reference": asdict(facts.reference),
        "hypervolume": {"final": by_trial[-1], "by_trial": by_trial},
        "default": {"name": facts.default_name, "front": [asdict(point) for point in facts.default]},
        "gain": {**asdict(over), "at_joules": None if math.isnan(over.at_joules) else over.at_joules}
        | {"accuracy": None if math.isinf(over.accuracy) else over.accuracy, "dominates": over.dominates},
        "union_front": [one.to_dict() for one in union],
        "chosen": {
            "trial": chosen.trial.id,
            "params": chosen.trial.params,
            "hard_classes": list(chosen.trial.hard_classes),
            "operating_point": chosen.operating_point,
            "test": asdict(chosen.test),
            "default_test": asdict(chosen.default_test),
        },
        "seconds": dict(facts.seconds),
        "files": dict(facts.files),
    }
    plain: dict[str, Any] = json.loads(json.dumps({**report, "summary": summary(report, over)}))
    return plain


def summary(report: Mapping[str, Any], over: Gain) -> str:
    """The result in words: whether anything was gained, and what was chosen."""
    against = report["default"]["name"]
    if over.dominates:
        gained = (
            f"The union front of {report['trials']['finished']} trials dominates {against} somewhere: at equal joules "
            f"by up to {100 * over.accuracy:.2f} points of accuracy (at {1e6 * over.at_joules:.2f} µJ an image), "
            f"at equal accuracy by up to {over.joules_share:.0%} of the joules."
        )
    else:
        gained = (
            f"The union front of {report['trials']['finished']} trials does not dominate {against} anywhere: "
            "it is nowhere more accurate at equal joules."
        )
    chosen = report["chosen"]
    ours, default = chosen["test"], chosen["default_test"]
    return (
        f"{gained} Chosen: trial {chosen['trial']}; on test its operating point is right for {ours['accuracy']:.2%} at "
        f"{1e6 * sum(ours['joules'].values()):.2f} µJ an image (without the study {default['accuracy']:.2%} at "
        f"{1e6 * sum(default['joules'].values()):.2f} µJ). Union hypervolume {report['hypervolume']['final']:.4f}."
    )


# Figures


def figures(trials: Sequence[Trial], facts: Facts) -> dict[str, Figure]:
    """Each figure of a study by its file name."""
    return {
        "union_front": union_figure(trials, facts),
        "hypervolume": hypervolume_figure(trials, facts.reference),
        "parallel_coordinates": parallel_coordinates(trials, facts.space),
    }


def front_figure(trial: Trial) -> Figure:
    """One trial's front."""
    figure, axes = _figure(f"Trial {trial.id} (validation)", "energy of the edge device, µJ an image", "accuracy")
    _draw(axes, trial.front, f"trial {trial.id}", ".-")
    axes.legend(fontsize=8)
    return figure


def union_figure(trials: Sequence[Trial], facts: Facts) -> Figure:
    """Every trial's front, the default's and the union."""
    figure, axes = _figure("Fronts of the study (validation)", "energy of the edge device, µJ an image", "accuracy")
    for trial in trials:
        if trial.state == "finished":
            _draw(axes, trial.front, None, "-", color="#9aa5b1", linewidth=0.7, alpha=0.7)
    _draw(axes, facts.default, facts.default_name, "-", color="#e45756", linewidth=1.5)
    _draw(axes, [one.point for one in union_front(trials)], "union of the trials", "-", color="#4c78a8", linewidth=2)
    axes.legend(fontsize=8)
    return figure


def hypervolume_figure(trials: Sequence[Trial], reference: Reference) -> Figure:
    """Of the union front, after each trial."""
    figure, axes = _figure("Hypervolume of the union front", "finished trials", "hypervolume")
    values = hypervolumes([trial for trial in trials if trial.state == "finished"], reference)
    axes.step(range(1, len(values) + 1), values, where="post")
    axes.plot(range(1, len(values) + 1), values, ".")
    return figure


def parallel_coordinates(trials: Sequence[Trial], space: Space) -> Figure:
    """A line a trial over all parameters, from dark (small hypervolume) to bright (large); stopped ones dashed."""
    names = list(space.parameters)[:20]
    figure = Figure(figsize=(max(6, 1.1 * len(names) + 2), 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Parameters of the trials")
    volumes = [trial.measured.hypervolume for trial in trials]
    low, high = min(volumes), max(volumes)
    from matplotlib import colormaps

    for trial in sorted(trials, key=lambda one: one.measured.hypervolume):
        share = (trial.measured.hypervolume - low) / max(1e-12, high - low)
        heights = [_height(space.parameters[name], trial.params[name]) for name in names]
        style = "-" if trial.state == "finished" else "--"
        axes.plot([*heights, share], style, color=colormaps["viridis"](share), alpha=0.8)
    ticks = [*(name.split(".")[-1].replace("_", "\n") for name in names), "hyper-\nvolume"]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    for number, name in enumerate(names):
        for height, text in _marks(space.parameters[name]):
            axes.annotate(text, (number, height), fontsize=6, ha="center", color="#57606a")
    axes.annotate(f"{low:.3f}", (len(names), 0), fontsize=6, ha="center", color="#57606a")
    axes.annotate(f"{high:.3f}", (len(names), 1), fontsize=6, ha="center", color="#57606a")
    axes.set_yticks([])
    return figure


def _height(domain: Domain, value: Value) -> float:
    if isinstance(domain, Choice):
        return domain.values.index(value) / max(1, len(domain.values) - 1)
    low, high, number = float(domain.low), float(domain.high), float(value)
    if isinstance(domain, FloatRange) and domain.log:
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low) if high > low else 0.5


def _marks(domain: Domain) -> list[tuple[float, str]]:
    ends = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    return [(_height(domain, end), f"{end:.3g}" if isinstance(end, float) else str(end)) for end in ends]


def _draw(axes: Any, front: Sequence[FrontPoint], label: str | None, style: str, **options: Any) -> None:
    joules = np.array([1e6 * point.joules for point in front])
    accuracy = [point.accuracy for point in front]
    axes.step(joules, accuracy, style, where="post", label=label, **options)


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


# Files


def write(folder: Path, report: Mapping[str, Any], trials: Sequence[Trial], facts: Facts) -> None:
    """`report.json`, `report.html` and `union_front.csv`."""
    write_text(json.dumps(report, indent=2), folder / "report.json")
    write_text(front_csv(union_front(trials)), folder / "union_front.csv")
    page = _PAGE.substitute(
        style=plots.STYLE,
        space=html.escape(facts.space.name),
        recipe=html.escape(facts.recipe),
        seed=facts.seed,
        summary=html.escape(report["summary"]),
        plots="".join(f"<div>{plots.svg(figure)}</div>" for figure in figures(trials, facts).values()),
        table=_table(trials, facts, report["chosen"]["trial"]),
    )
    write_text(page, folder / "report.html")


def front_csv(union: Sequence[UnionPoint]) -> str:
    """The union front, a point a line."""
    names = ["trial", *FrontPoint.__dataclass_fields__]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for one in union:
        writer.writerow(one.to_dict() | {"thresholds": json.dumps(one.point.thresholds)})
    return buffer.getvalue()


def _table(trials: Sequence[Trial], facts: Facts, chosen: str) -> str:
    names = list(facts.space.parameters)[:8]
    heads = ("trial", *(name.split(".")[-1] for name in names), "hypervolume", "point: accuracy", "µJ", "state", "s")
    rows = []
    for trial in sorted(trials, key=lambda one: -one.measured.hypervolume):
        mark = ' class="chosen"' if trial.id == chosen else ""
        values = [trial.params[name] for name in names]
        shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        point = (f"{trial.measured.accuracy:.2%}", f"{1e6 * trial.measured.joules:.2f}")
        cells = (trial.id, *shown, f"{trial.measured.hypervolume:.4f}", *point, trial.state, f"{trial.seconds:.1f}")
        rows.append(f"<tr{mark}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>{''.join(rows)}</table>"
