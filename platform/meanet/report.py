"""What a run says of itself: `report.json`, a table for the terminal, and a page with plots. All on the test split."""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from meanet import plots
from meanet.evaluation import ExitsTable
from meanet.operating_point import Search
from meanet.policies import authors_threshold, baselines, random_routing, routing_efficiency
from meanet.replay import Outcome, replay
from meanet.routing import Policy
from meanet.storage import write_text

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MEANet: $recipe</title>
<style>$style</style></head><body>
<h1>MEANet: recipe <code>$recipe</code>, seed $seed</h1>
<p>$summary</p>
<h2>Policies, on the test split</h2>
$table
<p class="note">Energy is the edge device's, per image, $source. The operating point was chosen on validation; nothing
was chosen on test. Random: as many images to the cloud as at the operating point, whichever they are. Oracle: each
sample by the cheapest exit that is right.</p>
<div class="plots">$plots</div>
<h2>Operating point</h2><pre>$point</pre>
<h2>Stages</h2><pre>$seconds</pre>
</body></html>
""")


@dataclass(frozen=True)
class Facts:
    """Of the run, beside its exits table."""

    seed: int
    """Of the recipe."""
    commit: str
    """Of the code; `unknown` outside a checkout."""
    seconds: dict[str, float]
    """Wall time by stage."""
    files: dict[str, str]
    """Name -> path of what the run wrote."""


def build(table: ExitsTable, search: Search, facts: Facts) -> dict[str, Any]:
    """The content of `report.json`."""
    test, costs = table.exits("test"), table.costs
    policy = Policy.from_dict(search.chosen)
    outcomes = baselines(test, costs, authors_threshold(table.exits("validation")))
    point = replay(test, costs, policy)
    outcomes["operating_point"] = point
    outcomes["random"] = random_routing(test, costs, policy, point.share["cloud"])
    return {
        "recipe": table.recipe.name,
        "seed": facts.seed,
        "commit": facts.commit,
        "split": "test",
        "samples": test.num_samples,
        "hard_classes": list(table.hard_classes),
        "seconds": facts.seconds,
        "routing_efficiency": routing_efficiency(test, policy),
        "policies": {name: _outcome(value) for name, value in outcomes.items()},
        "operating_point": search.chosen,
        "files": facts.files,
    }


def _outcome(value: Outcome) -> dict[str, Any]:
    return asdict(value)


def text_table(report: Mapping[str, Any]) -> str:
    """The policies as lines for a terminal."""
    lines = [f"{'policy':<18}{'accuracy':>9}{'hard':>8}{'main':>8}{'ext.':>8}{'cloud':>8}{'uJ/image':>11}{'bytes':>8}"]
    lines += [
        f"{name:<18}{cells[0]:>9}{cells[1]:>8}{cells[2]:>8}{cells[3]:>8}{cells[4]:>8}{cells[5]:>11}{cells[6]:>8}"
        for name, cells in _rows(report)
    ]
    return "\n".join(lines)


def _rows(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for name, policy in sorted(report["policies"].items(), key=lambda item: sum(item[1]["joules"].values())):
        share = policy["share"]
        shares = [f"{share[exit_]:.1%}" for exit_ in ("main", "extension", "cloud")]
        joules = f"{1e6 * sum(policy['joules'].values()):.2f}"
        accuracy = [f"{policy['accuracy']:.2%}", f"{policy['accuracy_hard_classes']:.1%}"]
        rows.append((name, [*accuracy, *shares, joules, f"{policy['bytes_uploaded']:.1f}"]))
    return rows


def _html_table(report: Mapping[str, Any]) -> str:
    heads = ("policy", "accuracy", "of hard classes", "main", "extension", "cloud", "µJ an image", "bytes an image")
    rows = []
    for name, cells in _rows(report):
        mark = ' class="chosen"' if name == "operating_point" else ""
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{mark}><td>{html.escape(name.replace('_', ' '))}</td>{columns}</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def summary(report: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    point, cloud = report["policies"]["operating_point"], report["policies"]["cloud_only"]
    saved = 1 - sum(point["joules"].values()) / sum(cloud["joules"].values())
    return (
        f"The cascade answers {point['accuracy']:.2%} of {report['samples']} test images rightly "
        f"(cloud-only {cloud['accuracy']:.2%}), sends {point['share']['cloud']:.1%} of them to the cloud and spends "
        f"{saved:.0%} less energy on the device than sending all."
    )


def write(folder: Path, report: dict[str, Any], table: ExitsTable, search: Search) -> None:
    """`report.json` and the self-contained `report.html`."""
    write_text(json.dumps(report, indent=2), folder / "report.json")
    page = _PAGE.substitute(
        style=plots.STYLE,
        recipe=html.escape(report["recipe"]),
        seed=report["seed"],
        summary=html.escape(summary(report)),
        table=_html_table(report),
        source=html.escape(report["policies"]["operating_point"]["joules_source"]),
        plots="".join(
            f"<div>{plots.svg(figure)}</div>" for figure in plots.all_figures(report, table, search).values()
        ),
        point=html.escape(json.dumps(report["operating_point"], indent=2)),
        seconds="\n".join(f"{name:<12} {value:8.1f} s" for name, value in report["seconds"].items()),
    )
    write_text(page, folder / "report.html")
