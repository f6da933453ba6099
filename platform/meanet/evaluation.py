"""Every network once over validation and test -> the exits table, from which any policy can be replayed.

Parquet, one row a sample. Metadata under `meanet` (JSON): format, class names, hard classes, model, recipe, seed,
payload, MACs and bytes moved of each block, digest of the data. A payload with loss has columns of its own for what the
cloud says of what arrives: `cloud_pred_jpeg90` beside `cloud_pred`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from meanet.artifact import TrainedModel
from meanet.config import EnergyConfig, OperatingPointConfig, Payload, Recipe, jpeg_quality
from meanet.data import Images, Splits
from meanet.energy import BytesMoved, CostModel, Macs, cost_model
from meanet.errors import UserError
from meanet.exits_columns import check_columns, matrix
from meanet.preprocessing import transmit
from meanet.replay import Exits
from meanet.routing import Ints, Policy, read, read_extension, read_main
from meanet.storage import check_readable, read_parquet

_KEY = b"meanet"


def exits_table(model: TrainedModel, splits: Splits) -> pa.Table:
    """Run every network once on every validation and test image."""
    parts = [_exits_of(model, splits.table, name, rows) for name, rows in _reported(splits)]
    description = {
        "format": 1,
        "recipe": model.recipe.to_dict(),
        "class_names": model.class_names,
        "hard_classes": model.hard_classes,
        "macs": asdict(model.macs),
        "bytes_moved": asdict(model.bytes_moved),
        "data_digest": model.data_digest,
    }
    return pa.concat_tables(parts).replace_schema_metadata({_KEY: json.dumps(description).encode()})


def _reported(splits: Splits) -> list[tuple[str, Ints]]:
    return [("validation", splits.validation), ("test", splits.test)]


def _exits_of(model: TrainedModel, table: Images, split: str, rows: Ints) -> pa.Table:
    policy, payload = Policy(hard_classes=model.hard_classes), model.recipe.energy.payload
    lossy = payload if jpeg_quality(payload) is not None else None
    run = _run(model, table, rows, lossy)
    main, cloud = read_main(run["main"], policy), read(run["cloud"])
    extension = read_extension(run["extension"], policy)
    columns = {
        "split": [split] * len(rows),
        "index": rows,
        "label": table.labels[rows],
        "main_pred": main.pred,
        "main_confidence": main.confidence,
        "main_entropy": main.entropy,
        "extension_pred": extension.pred,
        "extension_confidence": extension.confidence,
        "extension_entropy": extension.entropy,
        "cloud_pred": cloud.pred,
        "cloud_confidence": cloud.confidence,
        "upload_bytes_png": run["png_bytes"],
        "upload_bytes_raw": np.full(len(rows), int(np.prod(table.image_shape))),
        "main_logits": _lists(run["main"]),
        "extension_logits": _lists(run["extension"]),
    }
    if lossy:
        arrived = read(run["lossy_cloud"])
        columns |= {f"cloud_pred_{lossy}": arrived.pred, f"cloud_confidence_{lossy}": arrived.confidence}
        columns[f"upload_bytes_{lossy}"] = run["lossy_bytes"]
    return pa.table(columns)


@torch.inference_mode()
def _run(model: TrainedModel, table: Images, rows: Ints, lossy: Payload | None) -> dict[str, Any]:
    """What every network says of every image, on the device where the networks are.

    Returns:
        (N, C), (N, H) and (N, C) logits of `main`, `extension` and `cloud`, and `png_bytes` (N,); with a payload that
        loses something, also `lossy_cloud` (N, C), the cloud's logits of what arrives, and `lossy_bytes` (N,).
    """
    parts: list[dict[str, Any]] = []
    device = next(model.networks.cloud.parameters()).device
    for images in table.batches(rows, table.evaluation_batch):
        batch = torch.from_numpy(model.preprocessing.normalise(images)).to(device)
        features, logits = model.networks.meanet.main(batch)
        part = {
            "main": logits.cpu().numpy(),
            "extension": model.networks.meanet.path(batch, features).cpu().numpy(),
            "cloud": model.networks.cloud(batch).cpu().numpy(),
            "png_bytes": transmit(images, "png")[1],
        }
        if lossy:
            arrived, part["lossy_bytes"] = transmit(images, lossy)
            again = torch.from_numpy(model.preprocessing.normalise(arrived)).to(device)
            part["lossy_cloud"] = model.networks.cloud(again).cpu().numpy()
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _lists(logits: Any) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).ravel()), logits.shape[1])


class ExitsTable:
    """A recorded exits table, checked: ours, or a user's own with the same columns.

    Raises:
        UserError: a missing column, one of the wrong type or range, or a description that is missing or does not fit.
    """

    def __init__(
        self, table: pa.Table, source: str | Path = "the exits table", description: dict[str, Any] | None = None
    ) -> None:
        """`description` stands in for what the table's own metadata lacks: `hard_classes`, `macs`, `class_names`."""
        self.table, self.source = table, source
        known = _metadata(table, source) | (description or {})
        lacking = [name for name in ("hard_classes", "macs") if name not in known]
        if lacking:
            raise UserError(
                f"{source} does not say {' and '.join(lacking)} in its `meanet` metadata: write the table with "
                "jobs.evaluate, or give --hard-classes (hardest first) and --macs (of main, adaptive, extension, cloud)"
            )
        try:
            self.macs = Macs(**known["macs"])
            moved = known.get("bytes_moved")  # not in tables written before there were such profiles
            self.bytes_moved = BytesMoved(**moved) if moved else None
            self.hard_classes = tuple(int(class_id) for class_id in known["hard_classes"])
            self._recipe = Recipe.from_dict(known["recipe"]) if "recipe" in known else None
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{source} has no readable `meanet` metadata ({error}): write it with jobs.evaluate"
            ) from error
        num_classes = check_columns(table, source, self.hard_classes)
        names = known.get("class_names") or range(num_classes)
        self.class_names = tuple(str(name) for name in names)
        if len(self.class_names) != num_classes:
            raise UserError(
                f"{source} has {num_classes} main logits and {len(self.class_names)} class names: give one each"
            )
        self.energy = self._recipe.energy if self._recipe else EnergyConfig()
        self.operating_point = self._recipe.operating_point if self._recipe else OperatingPointConfig()

    @staticmethod
    def read(uri: str | Path, description: dict[str, Any] | None = None) -> "ExitsTable":
        """From a path or s3:// URI."""
        check_readable(str(uri))
        return ExitsTable(read_parquet(uri), uri, description)

    @property
    def recipe(self) -> Recipe:
        """What trained the model behind it.

        Raises:
            UserError: a table of a user's own names none.
        """
        if self._recipe is None:
            raise UserError(f"{self.source} names no recipe: write it with jobs.evaluate")
        return self._recipe

    @property
    def costs(self) -> CostModel:
        """Joules and seconds by `energy`'s profiles."""
        return cost_model(self.energy, self.macs, self.bytes_moved)

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """Those whose bytes, and whose answers of the cloud, are recorded."""
        prefix, names = "upload_bytes_", self.table.column_names
        found = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return tuple(payload for payload in found if self._cloud_column(payload) in names)

    @staticmethod
    def _cloud_column(payload: Payload) -> str:
        return "cloud_pred" if payload in ("png", "raw") else f"cloud_pred_{payload}"

    def exits(self, split: str, payload: Payload | None = None) -> Exits:
        """The recorded exits of `validation` or `test`, the cloud's of what arrives of that payload.

        Raises:
            UserError: the payload was not recorded; there are no such rows.
        """
        payload = payload or self.energy.payload
        if payload not in self.payloads:
            known = ", ".join(self.payloads) or "none"
            raise UserError(
                f"the exits table has no payload {payload!r} (it has {known}): choose one of these (--payload of "
                f"jobs.sweep), or evaluate again with --energy.payload {payload}; it takes the columns "
                f"upload_bytes_{payload} and {self._cloud_column(payload)}"
            )
        rows = self.table.filter(pa.compute.equal(self.table["split"], split))
        if not rows.num_rows:
            raise UserError(f"the exits table has no {split} rows: evaluate again")
        count = rows.num_rows
        extended = bool(self.hard_classes)
        return Exits(
            labels=rows["label"].to_numpy(),
            main_logits=matrix(rows["main_logits"], count),
            extension_logits=matrix(rows["extension_logits"], count) if extended else np.zeros((count, 0), np.float32),
            cloud_pred=rows[self._cloud_column(payload)].to_numpy(),
            upload_bytes=rows[f"upload_bytes_{payload}"].to_numpy(),
            hard_classes=self.hard_classes,
        )

    def index(self, split: str) -> Ints:
        """The data set's rows behind `exits(split)`, in the same order."""
        mask = pa.compute.equal(self.table["split"], split)
        index: Ints = self.table.filter(mask)["index"].to_numpy()
        return index


def _metadata(table: pa.Table, source: str | Path) -> dict[str, Any]:
    try:
        found = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except ValueError as error:
        raise UserError(f"{source} has `meanet` metadata that is no JSON: write it with jobs.evaluate") from error
    if not isinstance(found, dict):
        raise UserError(f"{source} has `meanet` metadata that is no JSON object: write it with jobs.evaluate")
    return found
