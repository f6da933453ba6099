"""Search every operating point of an exits table exactly: `python -m jobs.sweep outputs/digits/exits.parquet`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs import _cli
from meanet.config import OperatingPointConfig
from meanet.errors import exit_on_user_error
from meanet.evaluation import ExitsTable
from meanet.operating_point import Search, search
from meanet.storage import write_text
from tune_spaces.policies import SPACES


@dataclass(frozen=True)
class Flags:
    """Compare every threshold of every gate and split size on validation; report on test."""

    exits: Annotated[str, tyro.conf.Positional]
    """The exits table: a path or s3:// URI."""
    space: Literal["all_gates", "paper"] = "all_gates"
    """Which policies to compare, a function of tune_spaces.policies."""
    max_accuracy_loss_vs_cloud: float | None = None
    """How far accuracy may fall below cloud-only's, 0..1; the recipe's own if not given."""
    confidence: float | None = None
    """How sure validation must make us of that, 0.5..1; the recipe's own if not given."""
    device: str | None = None
    """Device profile; the recipe's own if not given."""
    link: str | None = None
    """Link profile; the recipe's own if not given."""
    output: Path | None = None
    """Where to write the operating point as JSON; beside a local exits table if not given."""
    json: bool = False
    """Print the result as JSON."""


def sweep(table: ExitsTable, space: str, constraint: OperatingPointConfig, run: str | None) -> Search:
    """The sweep stage."""
    policies = SPACES[space]()
    return search(table, constraint, policies.gates, policies.split_sizes, run)


def _override(table: ExitsTable, flags: Flags) -> OperatingPointConfig:
    """Put the flags over the recipe's own choices."""
    recipe = table.recipe
    energy = {name: value for name in ("device", "link") if (value := getattr(flags, name)) is not None}
    table.recipe = dataclasses.replace(recipe, energy=dataclasses.replace(recipe.energy, **energy))
    names = ("max_accuracy_loss_vs_cloud", "confidence")
    chosen = {name: value for name in names if (value := getattr(flags, name)) is not None}
    return dataclasses.replace(recipe.operating_point, **chosen)


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("sweep", Flags)
    table = ExitsTable.read(flags.exits)
    found = sweep(table, flags.space, _override(table, flags), run=None)
    output = flags.output or (None if "://" in flags.exits else Path(flags.exits).with_name("operating_point.json"))
    if output:
        write_text(json.dumps(found.chosen, indent=2), output)
    result = found.to_dict(table)
    if flags.json:
        print(json.dumps(result))
        return
    print(f"{found.points} operating points in {found.seconds:.2f} s; the accuracy-joules fronts:")
    print(
        f"{'gate':<14}{'classes':>8}{'threshold':>11}{'accuracy':>10}{'uJ':>9}{'cloud':>8}"
        f"{'on test':>10}{'uJ':>10}{'cloud':>8}"
    )
    for row in result["front"]:
        (threshold,), test = row["thresholds"], row["test"]
        shown = "never" if threshold is None else f"{threshold:.4f}"
        print(
            f"{row['gate']:<14}{row['num_hard_classes']:>8}{shown:>11}{row['accuracy']:>10.2%}"
            f"{1e6 * row['joules']:>9.2f}{row['cloud_share']:>8.1%}"
            f"{test['accuracy']:>10.2%}{1e6 * test['joules']:>10.2f}{test['cloud_share']:>8.1%}"
        )
    print(f"operating point {found.chosen['id']}: {json.dumps(found.chosen['expected'])}")
    if output:
        print(f"written to {output}; next: python -m jobs.register {output.parent}")


if __name__ == "__main__":
    main()
