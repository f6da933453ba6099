"""What every server of `benchmarks.serving` serves: the evidence's ResNet-32 B, registered and as ONNX files.

The evidence holds no cloud network: a ResNet-18 of the same recipe, untrained, costs as much and answers nonsense, the
same nonsense everywhere.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file

from benchmarks.serving_peers.predict import Edge, decode, session, softmax
from meanet import artifact, data, onnx_export
from meanet.artifact import TrainedModel
from meanet.config import DataConfig, Recipe
from meanet.energy import Macs
from meanet.models import bytes_moved_of
from meanet.preprocessing import Preprocessing
from meanet.routing import Policy
from meanet.tracking import Tracker
from meanet.training import build_networks


def test_images(source: str, count: int) -> list[bytes]:
    """The first PNG files of `parquet:PATH`."""
    kind, _, place = source.partition(":")
    if kind != "parquet" or not Path(place).is_file():
        raise SystemExit(f"--data {source!r}: give parquet:PATH of a Parquet file with the hubs' struct of image bytes")
    table = pq.read_table(place)
    column = next(name for name in table.schema.names if str(table.schema.field(name).type).startswith("struct<bytes"))
    return [image["bytes"] for image in table[column].slice(0, count).to_pylist()]


def load_model(evidence: Path) -> TrainedModel:
    """The evidence's edge beside an untrained cloud."""
    described = json.loads((evidence / "model.json").read_text(encoding="utf-8"))
    recipe = Recipe.from_dict(described["recipe"])
    plain = described["preprocessing"]
    preprocessing = Preprocessing(**{**plain, "mean": tuple(plain["mean"]), "std": tuple(plain["std"])})
    networks = build_networks(recipe, preprocessing.image_shape, len(described["class_names"]))
    networks.meanet.load_state_dict(load_file(evidence / "edge.safetensors"))
    for module in (networks.meanet, networks.cloud):
        module.eval().requires_grad_(False)
    return TrainedModel(
        recipe=recipe,
        class_names=tuple(described["class_names"]),
        hard_classes=tuple(described["hard_classes"]),
        class_precision=tuple(described["class_precision"]),
        preprocessing=preprocessing,
        macs=Macs(**described["macs"]),
        bytes_moved=bytes_moved_of(networks.meanet, preprocessing.image_shape),
        data_digest=described["data_digest"],
        networks=networks,
    )


def export(model: TrainedModel, folder: Path, source: str, bodies: list[bytes], cloud_share: float) -> float:
    """Write the model's folder, its ONNX files and what the peers read of it.

    Returns:
        The threshold that sends `cloud_share` of the bodies up.
    """
    config = DataConfig(source=source, validation_fraction=0.1, test_fraction=0.1)
    onnx_export.export(model, artifact.save(model, folder), data.divide(data.load(config), config, 0), "onnx")
    described: dict[str, Any] = {"class_names": model.class_names, "hard_classes": model.hard_classes}
    _, logits = session(folder / "main.onnx").run(["features", "logits"], {"images": decode(bodies)})
    p = softmax(logits)
    entropy = np.sort(-(p * np.log(np.maximum(p, 1e-30))).sum(axis=1))
    place = len(entropy) - round(cloud_share * len(entropy))
    threshold = float(entropy[place - 1 : place + 1].mean())  # midway: rounding cannot move an image
    (folder / "served.json").write_text(json.dumps({**described, "threshold": threshold}))
    return threshold


def register(model: TrainedModel, uri: str, threshold: float, folder: Path) -> None:
    """The champion of a new store."""
    policy = Policy(thresholds=(threshold,), hard_classes=model.hard_classes)
    point = {**policy.to_dict(), "energy": asdict(model.recipe.energy)}
    tracker = Tracker(uri)
    tracker.promote(tracker.register(model.with_operating_point(point), tracker.start_run("serving", {}, {}), folder))


def expected(folder: Path, bodies: list[bytes]) -> list[tuple[int, str]]:
    """Class and exit of each body where the edge is alone."""
    edge = Edge(folder)
    return [(row["class_id"], row["exit"]) for row in edge.predict(bodies)]
