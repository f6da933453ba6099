"""Search every operating point of an exits table exactly: `python -m jobs.sweep outputs/digits/exits.parquet`."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jobs import _cli, _progress
from meanet.config import OperatingPointConfig
from meanet.energy import Macs
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable
from meanet.operating_point import Search, search
from meanet.profile_files import embed
from meanet.storage import write_text
from tune_spaces.policies import SPACES

_SHOWN = 8
"""Rows of each front that are printed; all of them with --json."""


@dataclass(frozen=True)
class Flags:
    """Compare every threshold of every gate and split size on validation; report on test.

    Bounds given here take the place of the recipe's own. Where accuracy is bounded the cheapest point is chosen, else
    the most accurate one.
    """

    exits: Annotated[str, tyro.conf.Positional]
    """The exits table: a path or s3:// URI."""
    space: Literal["all_gates", "one_gate", "early_gates", "paper"] = "all_gates"
    """Which policies to compare, a function of tune_spaces.policies."""
    max_energy: float | None = None
    """Joules of the device an image at most."""
    max_cloud_share: float | None = None
    """Share of the images that may go to the cloud, 0..1."""
    min_accuracy: float | None = None
    """Accuracy at least, 0..1."""
    max_accuracy_loss_vs_cloud: float | None = None
    """How far accuracy may fall below cloud-only's, 0..1."""
    max_latency: float | None = None
    """Expected seconds an image at most."""
    confidence: float | None = None
    """How sure validation must make us of the bounds on accuracy, 0.5..1; the recipe's own if not given."""
    device: str | None = None
    """Device profile; the recipe's own if not given."""
    link: str | None = None
    """Link profile; the recipe's own if not given."""
    payload: str | None = None
    """What is sent to the cloud, as the table has it: png, raw or jpegQ; the recipe's own if not given."""
    profiles: str | None = None
    """A YAML file with further profiles; the recipe's own if not given."""
    tail: Literal["none", "amortised", "isolated"] | None = None
    """What the radio's tail adds to an upload; the recipe's own if not given."""
    cloud_seconds: float | None = None
    """What the cloud takes for an image, for latency; the recipe's own if not given."""
    uploads_per_second: float | None = None
    """Of the device, for an amortised tail; the recipe's own if not given."""
    hard_classes: tuple[int, ...] | None = None
    """Of a table of your own: class ids of the extension's columns, hardest first."""
    macs: tuple[int, int, int, int] | None = None
    """Of a table of your own: multiply-accumulates of main, adaptive, extension and cloud."""
    output: Path | None = None
    """Where to write the operating point as JSON; beside a local exits table if not given."""
    json: bool = False
    """Print the result as JSON."""


BOUNDS = ("max_energy", "max_cloud_share", "min_accuracy", "max_accuracy_loss_vs_cloud", "max_latency")
_ENERGY = ("device", "link", "payload", "profiles", "tail", "uploads_per_second", "cloud_seconds")


def sweep(table: ExitsTable, space: str, constraint: OperatingPointConfig, run: str | None) -> Search:
    """The sweep stage."""
    policies = SPACES[space]()
    sizes = policies.sizes(len(table.hard_classes))
    return search(table, constraint, policies.gates, sizes, run, scaled=policies.scaled)


def read_table(flags: Flags) -> ExitsTable:
    """The table that the flags name, with their energy profiles in place of the recipe's."""
    description: dict[str, Any] = {}
    if flags.hard_classes is not None:
        description["hard_classes"] = flags.hard_classes
    if flags.macs is not None:
        if min(flags.macs) < 0:
            raise UserError(f"--macs {flags.macs}: none may be negative")
        description["macs"] = asdict(Macs(*flags.macs))
    table = ExitsTable.read(flags.exits, description)
    table.energy = embed(dataclasses.replace(table.energy, **_given(flags, _ENERGY)))
    for split in ("validation", "test"):
        table.exits(split)  # what is missing is said before anything is written
    return table


def _given(flags: Flags, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(flags, name)) is not None}


def constraint_of(flags: Flags, own: OperatingPointConfig) -> OperatingPointConfig:
    """The bounds of the flags; the recipe's own where none was given."""
    bounds = _given(flags, BOUNDS)
    confidence = own.confidence if flags.confidence is None else flags.confidence
    if not bounds:
        return dataclasses.replace(own, confidence=confidence)
    return OperatingPointConfig(**({"max_accuracy_loss_vs_cloud": None} | bounds | {"confidence": confidence}))


def _show(result: dict[str, Any]) -> None:
    print(
        f"{'gate':<24}{'classes':>8}{'threshold':>17}{'accuracy':>10}{'95% interval':>16}{'uJ':>9}{'cloud':>8}"
        f"{'on test':>10}{'uJ':>10}{'cloud':>8}"
    )
    kinds = dict.fromkeys((row["gate"], row["scaled"]) for row in result["front"])
    for kind in kinds:
        for row in result["front"]:
            if (row["gate"], row["scaled"]) == kind:
                _show_row(row)
    print(f"({len(result['front'])} of the fronts' {result['front_size']} points; --json has them all)")


def _show_row(row: dict[str, Any]) -> None:
    test, (low, high) = row["test"], row["accuracy_interval"]
    thresholds = " ".join("never" if value is None else f"{value:.4f}" for value in row["thresholds"])
    same = "=" if row["same_as_operating_point"] else " "
    print(
        f"{row['gate'] + (', scaled' if row['scaled'] else ''):<24}{row['num_hard_classes']:>8}{thresholds:>17}"
        f"{row['accuracy']:>10.2%}{f'{low:.1%}..{high:.1%}{same}':>16}{1e6 * row['joules']:>9.2f}"
        f"{row['cloud_share']:>8.1%}{test['accuracy']:>10.2%}{1e6 * test['joules']:>10.2f}{test['cloud_share']:>8.1%}"
    )


def _show_next(flags: Flags, output: Path | None) -> None:
    if output is None:
        return
    folder = Path(flags.exits).parent
    own = "" if output == folder / "operating_point.json" else f" --operating-point {output}"
    has_model = (folder / "model").exists()
    print(f"written to {output}" + (f"; next: python -m jobs.register {folder}{own}" if has_model else ""))


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("sweep", Flags)
    table = read_table(flags)
    if flags.max_latency is not None and "without compute" in table.costs.latency_source:
        _progress.say(
            f"note: device {table.energy.device!r} has no speed, so that --max-latency bounds the link's time alone; "
            "`python -m jobs.measure` writes a profile that has one"
        )
    found = sweep(table, flags.space, constraint_of(flags, table.operating_point), run=None)
    output = flags.output or (None if "://" in flags.exits else Path(flags.exits).with_name("operating_point.json"))
    if output:
        write_text(json.dumps(found.chosen, indent=2), output)
    result = found.to_dict(table, None if flags.json else _SHOWN)
    if flags.json:
        print(json.dumps(result))
        return
    print(
        f"{found.points} policies covered in {found.seconds:.2f} s (two_gate's by merging fronts of one); the "
        f"accuracy-joules fronts, energy {result['joules_source']}, latency {result['latency_source']}:"
    )
    _show(result)
    print("= : no different in accuracy from the operating point (bootstrap over validation images, 95%)")
    print(f"{len(result['pareto'])} policies are unbeaten in accuracy, joules, cloud share and latency together")
    print(f"operating point {found.chosen['id']}, on validation: {json.dumps(found.chosen['expected'])}")
    test = result["operating_point_on_test"]
    low, high = test["accuracy_interval"]
    print(
        f"on test: accuracy {test['accuracy']:.2%} ({low:.2%}..{high:.2%}; cloud-only "
        f"{test['accuracy_cloud_only']:.2%}), {1e6 * sum(test['joules'].values()):.2f} uJ an image, "
        f"{test['share']['cloud']:.1%} to the cloud"
    )
    _show_next(flags, output)


if __name__ == "__main__":
    main()
