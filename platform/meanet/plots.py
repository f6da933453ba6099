"""The report's figures, by matplotlib without its global state."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meanet.evaluation import ExitsTable
from meanet.operating_point import Search, kinds
from meanet.replay import Exits, Replayer
from meanet.routing import Exit, Policy, read_main, route

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.6rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #d8dee4 } th:first-child, td:first-child
{ text-align: left } tr.chosen { background: #fff6d8; font-weight: 600 }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .plots svg { width: 100%; height: auto }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 13px } .note { color: #57606a }
"""
"""Of the pages that hold the figures."""
_COLOURS = {"main": "#4c78a8", "extension": "#f58518", "cloud": "#9aa5b1"}


def all_figures(report: Mapping[str, Any], table: ExitsTable, search: Search) -> dict[str, Figure]:
    """Each figure by its file name."""
    test, policy = table.exits("test"), Policy.from_dict(search.chosen)
    return {
        "accuracy_energy": accuracy_energy(report, table, search),
        "who_answered": who_answered(test, policy, table.class_names),
        "entropy": entropy(test, policy),
        "hard_confusion": hard_confusion(test, table.class_names),
    }


def accuracy_energy(report: Mapping[str, Any], table: ExitsTable, search: Search) -> Figure:
    """Test accuracy against energy: each gate's validation-chosen front, and the single policies."""
    figure, axes = _figure("Accuracy against energy (test)")
    on_test = Replayer(table.exits("test"), table.costs)
    for gate, scaled, rows in kinds(search.front):
        front = search.front.take(rows)
        outcomes = [on_test.replay(search.policy(front, row, table)) for row in range(len(front))]
        joules = [1e6 * outcome.total_joules for outcome in outcomes]
        label = f"gate {gate.replace('_', ' ')}{', scaled' if scaled else ''}"
        axes.plot(joules, [outcome.accuracy for outcome in outcomes], ".-", alpha=0.6, label=label)
    for (name, policy), marker in zip(report["policies"].items(), "sD^v<P*X", strict=False):
        joules_spent = 1e6 * sum(policy["joules"].values())
        size = 13 if name == "operating_point" else 8
        axes.plot([joules_spent], [policy["accuracy"]], marker, markersize=size, ls="", label=name.replace("_", " "))
    axes.set(xscale="log", xlabel="energy of the edge device, µJ an image", ylabel="accuracy")
    axes.legend(fontsize=7)
    return figure


def entropy(exits: Exits, policy: Policy) -> Figure:
    """Entropy of the main exit where it is right and where it is wrong."""
    figure, axes = _figure("Entropy of the main exit (test)")
    main = read_main(exits.main_logits, policy)
    right, finite = main.pred == exits.labels, np.isfinite(main.entropy)
    bins = np.linspace(0, max(0.1, float(main.entropy[finite].max(initial=0))), 40).tolist()
    axes.hist(main.entropy[right & finite], bins, alpha=0.7, label="right", color="#54a24b")
    axes.hist(main.entropy[~right & finite], bins, alpha=0.7, label="wrong", color="#e45756")
    if policy.gate == "main_entropy" and policy.threshold is not None:
        axes.axvline(policy.threshold, color="black", ls="--", label="threshold")
    axes.set(yscale="log", xlabel="entropy, nats", ylabel="images")
    axes.legend()
    return figure


def hard_confusion(exits: Exits, class_names: tuple[str, ...]) -> Figure:
    """What the edge alone answers to images of hard classes."""
    figure, axes = _figure("Hard classes, edge only (test)")
    routed = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, Policy(hard_classes=exits.hard_classes))
    counts = np.zeros((len(exits.hard_classes), len(class_names)), dtype=int)
    for row, class_id in enumerate(exits.hard_classes):
        counts[row] = np.bincount(routed.pred[exits.labels == class_id], minlength=len(class_names))
    axes.imshow(np.log1p(counts), cmap="Blues", aspect="auto")
    if counts.size <= 200:
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if counts[row, column] > counts.max() / 2 else "black"
            axes.text(column, row, str(counts[row, column] or ""), ha="center", va="center", fontsize=8, color=colour)
    if len(class_names) <= 20:
        axes.set_xticks(range(len(class_names)), class_names)
        axes.set_yticks(range(len(exits.hard_classes)), [class_names[class_id] for class_id in exits.hard_classes])
    axes.set(xlabel="answered", ylabel="true class, hardest first")
    return figure


def who_answered(exits: Exits, policy: Policy, class_names: tuple[str, ...]) -> Figure:
    """Share of each exit, by true class."""
    figure, axes = _figure("Who answered, by class (test)")
    routed = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, policy)
    total = np.maximum(np.bincount(exits.labels, minlength=len(class_names)), 1)
    bottom = np.zeros(len(class_names))
    for exit_ in Exit:
        share = np.bincount(exits.labels[routed.exit == exit_], minlength=len(class_names)) / total
        axes.bar(range(len(class_names)), share, bottom=bottom, label=exit_.label, color=_COLOURS[exit_.label])
        bottom += share
    if len(class_names) <= 20:
        hard = set(policy.hard_classes)
        names = [f"{name}*" if class_id in hard else name for class_id, name in enumerate(class_names)]
        axes.set_xticks(range(len(class_names)), names)
    axes.set(xlabel="true class (* = hard, in use)", ylabel="share", ylim=(0, 1.12))
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    return figure


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an element for a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: Path) -> Path:
    """The figure as a file."""
    figure.savefig(path, dpi=110)
    return path
