"""What a CIFAR-100 run came to: `python -m benchmarks.cifar100 outputs/cifar100_resnet32_b_fast`
-> docs/benchmarks/cifar100.md with its plots, and benchmarks/evidence/cifar100_resnet32_b.

The run is `jobs.train` and `jobs.evaluate`, or `benchmarks.gpu_training`. Its exits table is rounded to what the
evidence has room for; all here follows from the rounded table, so that whoever starts from the evidence gets these
figures. Nothing is chosen on test.
"""

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from mlflow import MlflowClient
from safetensors.numpy import load_file

from jobs._cli import commit
from meanet import plots, report
from meanet.evaluation import ExitsTable
from meanet.operating_point import Search, search
from meanet.policies import authors_threshold, random_routing, routing_efficiency, sedna_threshold
from meanet.replay import replay
from meanet.routing import MEASURES, Policy, read_extension, read_main

AUTHORS_HARD = (
    "72 44 10 67 50 73 52 3 4 59 35 55 62 98 78 2 7 47 11 77 42 45 96 5 46 38 87 32 29 25 88 27 33 95 14 65 93 80 99 "
    "26 74 34 79 92 18 22 63 90 24 71"
)
"""The authors' hard classes of CIFAR-100, hardest first (their released code)."""
_LIMIT = 10 * 2**20
_DROPPED_BITS = 11
"""Of a logit's 23 bits of mantissa: 12 are left, a relative error of 2**-13 at most."""


@dataclass(frozen=True)
class Flags:
    """Write the page, the plots and the evidence."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder: model/, exits.parquet, and run.json or benchmarks.gpu_training's history.json."""
    command: str
    """The command that trained it, as a reader would give it."""
    trained_at: str
    """The commit that trained it."""
    tracking_uri: str = ""
    """Its MLflow store; of no use to a run with a history.json."""
    note: str = ""
    """What else a reader should know of the run."""
    page: Path = Path("docs/benchmarks/cifar100.md")
    """The page; plots go beside it."""
    evidence: Path = Path("benchmarks/evidence/cifar100_resnet32_b")
    """Exits table and edge weights for later work."""


def rounded(table: pa.Table, hard_classes: tuple[int, ...]) -> pa.Table:
    """The table with logits of fewer bits, which compress to half, and what is read off them read off again."""
    policy, step = Policy(hard_classes=hard_classes), np.uint32(1 << _DROPPED_BITS)
    for name, reader in (("main", read_main), ("extension", read_extension)):
        logits = table[f"{name}_logits"].combine_chunks()
        bits = logits.flatten().to_numpy().view(np.uint32)
        kept = ((bits + step // np.uint32(2)) // step * step).view(np.float32)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(kept), logits.type.list_size)
        reading = reader(kept.reshape(len(logits), -1), policy)
        columns = {"logits": lists, "pred": reading.pred, "confidence": reading.confidence, "entropy": reading.entropy}
        for column, values in columns.items():
            place = table.schema.get_field_index(f"{name}_{column}")
            table = table.set_column(place, f"{name}_{column}", pa.array(values))
    return table


def history(flags: Flags) -> dict[str, list[dict[str, float]]]:
    """Phase -> an entry an epoch: seconds, loss, validation_accuracy; of the run's history.json, or of MLflow."""
    keys, found = ("seconds", "loss", "validation_accuracy"), dict[str, list[dict[str, float]]]()
    if (kept := recorded(flags)) is not None:
        for row in kept["phases"]:
            found.setdefault(row["phase"], []).append({key: row[key] for key in keys})
        return found
    client = MlflowClient(flags.tracking_uri)
    for phase, run in json.loads((flags.run / "run.json").read_text())["phase_runs"].items():
        columns = {key: {m.step: m.value for m in client.get_metric_history(run, key)} for key in keys}
        found[phase] = [{key: columns[key][step] for key in keys} for step in sorted(columns["loss"])]
    return found


def recorded(flags: Flags) -> dict[str, Any] | None:
    """The history.json of a run without Ray and MLflow."""
    path = flags.run / "history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def phases(flags: Flags) -> list[str]:
    """A line a phase: epochs, seconds an epoch, final loss and validation accuracy."""
    lines = [
        "| phase | epochs | seconds an epoch (median) | last loss | validation accuracy |",
        "|---|---|---|---|---|",
    ]
    for phase, epochs in history(flags).items():
        last, seconds = epochs[-1], median(row["seconds"] for row in epochs)
        lines.append(
            f"| {phase} | {len(epochs)} | {seconds:.{0 if seconds >= 10 else 1}f} | {last['loss']:.3f} "
            f"| {last['validation_accuracy']:.2%} |"
        )
    return lines


def where(flags: Flags) -> str:
    """What trained it, and what made the page."""
    here = f"{os.cpu_count()} CPUs ({platform.machine()}), no GPU, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "ray", "mlflow", "numpy")
    )
    if (kept := recorded(flags)) is None:
        return here
    on = kept["machine"]
    return (
        f"trained in {json.loads((flags.run / 'model' / 'model.json').read_text())['recipe']['precision']} on one "
        f"{on['device']} (Python {on['python']}, torch {on['torch']}, cuDNN {on['cudnn']}), everything else in "
        f"float32 on {here}"
    )


def policies(table: ExitsTable, found: Search, facts: report.Facts) -> tuple[dict[str, Any], list[str]]:
    """The report, and a line a policy: on test, with what random routing yields at the same cloud share."""
    built = report.build(table, found, facts)
    test, costs = table.exits("test"), table.costs
    gates = {
        "operating_point": Policy.from_dict(found.chosen),
        "authors_threshold": Policy(
            thresholds=(authors_threshold(table.exits("validation")),), hard_classes=table.hard_classes
        ),
        "sedna_filter": Policy(thresholds=(sedna_threshold(len(table.class_names)),), hard_classes=table.hard_classes),
    }
    lines = [
        "| policy | accuracy | of hard classes | main | extension | cloud | mJ an image | random routing at that cloud "
        "share | routing efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, policy in built["policies"].items():
        if name == "random":
            continue
        share = policy["share"]
        cells = [name.replace("_", " "), f"{policy['accuracy']:.2%}", f"{policy['accuracy_hard_classes']:.2%}"]
        cells += [f"{share[exit_]:.1%}" for exit_ in ("main", "extension", "cloud")]
        cells.append(f"{1e3 * sum(policy['joules'].values()):.3f}")
        if name in gates:
            random = random_routing(test, costs, gates[name], share["cloud"])
            efficiency = routing_efficiency(test, gates[name])
            cells += [f"{random.accuracy:.2%}", "" if efficiency is None else f"{efficiency:.3f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return built, lines


def fronts(table: ExitsTable, found: Search) -> list[str]:
    """What each distance from cloud-only costs: the cheapest policy within it on validation, as it does on test."""
    test, costs = table.exits("test"), table.costs
    lines = [
        "| at most below cloud-only (95% sure on validation) | gate | hard classes in use | accuracy | cloud | mJ |",
        "|---|---|---|---|---|---|",
    ]
    constraint = table.operating_point
    for loss in (0.005, 0.01, 0.02, 0.03, 0.05, 0.08):
        chosen = search(table, replace(constraint, max_accuracy_loss_vs_cloud=loss), MEASURES).chosen
        policy = Policy.from_dict(chosen)
        figures = replay(test, costs, policy)
        lines.append(
            f"| {100 * loss:.1f} points | {policy.gate} | {len(policy.hard_classes)} | {figures.accuracy:.2%} "
            f"| {figures.share['cloud']:.1%} | {1e3 * figures.total_joules:.3f} |"
        )
    assert found.points, "there are policies to choose from"
    return lines


def write_evidence(flags: Flags) -> dict[str, Any]:
    """Exits table and edge weights, at most 10 MB together, with their digests."""
    folder = flags.evidence
    folder.mkdir(parents=True, exist_ok=True)
    whole = ExitsTable.read(flags.run / "exits.parquet")
    pq.write_table(
        rounded(whole.table, whole.hard_classes),
        folder / "exits.parquet",
        compression="zstd",
        compression_level=19,
        use_dictionary=["split"],
        use_byte_stream_split=["main_logits.list.element", "extension_logits.list.element"],
    )
    for name in ("edge.safetensors", "model.json"):
        (folder / name).write_bytes((flags.run / "model" / name).read_bytes())
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    size = sum(path.stat().st_size for path in files)
    manifest = {
        "command": flags.command,
        "commit": flags.trained_at,
        "bytes": size,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "data_digest": json.loads((flags.run / "model" / "model.json").read_text())["data_digest"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if size > _LIMIT:
        raise SystemExit(f"the evidence has {size} bytes and may have {_LIMIT}")
    return manifest


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.cifar100")
    made_at = commit()  # before the evidence is another
    manifest = write_evidence(flags)
    table = ExitsTable.read(flags.evidence / "exits.parquet")
    found = search(table, table.operating_point, MEASURES)
    record = flags.run / "run.json"
    seconds = json.loads(record.read_text())["seconds"] if record.exists() else {}
    facts = report.Facts(table.recipe.seed, flags.trained_at, seconds, {})
    built, lines = policies(table, found, facts)
    folder = flags.page.parent / flags.page.stem
    folder.mkdir(parents=True, exist_ok=True)
    figures = plots.all_figures(built, table, found)
    for name, figure in figures.items():
        plots.save_png(figure, folder / f"{name}.png")
    (folder / "report.json").write_text(json.dumps(built, indent=2) + "\n")
    overlap = len(set(table.hard_classes) & {int(word) for word in AUTHORS_HARD.split()})
    weights = load_file(flags.run / "model" / "edge.safetensors")
    gate = found.chosen["gate"]
    images = [f"![{name.replace('_', ' ')}]({flags.page.stem}/{name}.png)" for name in figures]
    text = f"""# CIFAR-100, ResNet-32 B on the edge, ResNet-18 in the cloud

`{flags.command}`

Trained at commit {flags.trained_at}, this page made at {made_at}, {time.strftime("%Y-%m-%d")}; {where(flags)}.

{flags.note}

45,000 images to train on, 5,000 to choose on, CIFAR-100's own 10,000 to report on.

{chr(10).join(phases(flags))}

{sum(weight.size for weight in weights.values()) / 1e6:.2f} M numbers on the edge. Of the 50 hard classes, {overlap} are
among the authors' 50 (25 would be by chance).

## Policies, on test

{chr(10).join(lines)}

{report.summary(built)}

Energy is the edge device's, {table.costs.tag}, PNG uploads. Chosen on validation: the operating point (gate {gate}, the
cheapest of {found.points} policies that is, with 95% confidence, within half a point of cloud-only) and the authors'
threshold. Routing efficiency: (gate - random) / (oracle - random) in accuracy, at the gate's cloud share.

## What distance from the cloud costs

{chr(10).join(fronts(table, found))}

{chr(10).join(images)}

The exits table and the edge's weights stand in {flags.evidence} ({manifest["bytes"] / 2**20:.1f} MiB, digests in its
manifest.json); logits there are rounded to {23 - _DROPPED_BITS} bits of mantissa, and all figures here follow from
them.
"""
    flags.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
