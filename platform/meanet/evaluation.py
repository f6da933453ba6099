"""Every network once over validation and test -> the exits table, from which any policy can be replayed.

Parquet, one row a sample. Metadata under `meanet` (JSON): format, class names, hard classes, model, recipe, seed,
payload, MACs of each block, digest of the data.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from meanet.artifact import TrainedModel
from meanet.config import Payload, Recipe
from meanet.data import Images, Splits
from meanet.energy import CostModel, Macs, cost_model
from meanet.errors import UserError
from meanet.preprocessing import encode_png
from meanet.routing import Ints, Policy, read, read_extension, read_main
from meanet.storage import read_parquet
from meanet.thresholds import Exits

_KEY = b"meanet"
_COLUMNS = ("split", "index", "label", "main_logits", "extension_logits", "cloud_pred", "cloud_confidence")


def exits_table(model: TrainedModel, splits: Splits) -> pa.Table:
    """Run every network once on every validation and test image."""
    parts = [_exits_of(model, splits.table, name, rows) for name, rows in _reported(splits)]
    description = {
        "format": 1,
        "recipe": model.recipe.to_dict(),
        "class_names": model.class_names,
        "hard_classes": model.hard_classes,
        "macs": asdict(model.macs),
        "data_digest": model.data_digest,
    }
    return pa.concat_tables(parts).replace_schema_metadata({_KEY: json.dumps(description).encode()})


def _reported(splits: Splits) -> list[tuple[str, Ints]]:
    return [("validation", splits.validation), ("test", splits.test)]


def _exits_of(model: TrainedModel, table: Images, split: str, rows: Ints) -> pa.Table:
    policy = Policy(hard_classes=model.hard_classes)
    main_logits, extension_logits, cloud_logits, png_bytes = _run(model, table, rows)
    main, cloud = read_main(main_logits, policy), read(cloud_logits)
    extension = read_extension(extension_logits, policy)
    return pa.table(
        {
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
            "upload_bytes_png": png_bytes,
            "upload_bytes_raw": np.full(len(rows), int(np.prod(table.image_shape))),
            "main_logits": _lists(main_logits),
            "extension_logits": _lists(extension_logits),
        }
    )


@torch.inference_mode()
def _run(model: TrainedModel, table: Images, rows: Ints) -> tuple[Any, Any, Any, Ints]:
    """(N, C), (N, H) and (N, C) logits of main, extension and cloud, and (N,) bytes of each image as PNG."""
    main, extension, cloud, png_bytes = [], [], [], []
    for images in table.batches(rows, table.evaluation_batch):
        png_bytes += [len(encode_png(image)) for image in images]
        batch = torch.from_numpy(model.preprocessing.normalise(images))
        features, logits = model.networks.meanet.main(batch)
        main.append(logits.numpy())
        extension.append(model.networks.meanet.path(batch, features).numpy())
        cloud.append(model.networks.cloud(batch).numpy())
    return np.concatenate(main), np.concatenate(extension), np.concatenate(cloud), np.array(png_bytes)


def _lists(logits: Any) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).ravel()), logits.shape[1])


class ExitsTable:
    """A recorded exits table, checked.

    Raises:
        UserError: no whole Parquet file, a missing column, or no metadata of ours.
    """

    def __init__(self, table: pa.Table, source: str | Path = "the exits table") -> None:
        missing = [name for name in _COLUMNS if name not in table.column_names]
        if missing:
            raise UserError(f"{source} lacks the columns {', '.join(missing)}: write it with jobs.evaluate")
        try:
            description = json.loads((table.schema.metadata or {})[_KEY])
            self.recipe = Recipe.from_dict(description["recipe"])
            self.macs = Macs(**description["macs"])
            self.class_names = tuple(description["class_names"])
            self.hard_classes = tuple(description["hard_classes"])
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{source} has no readable `meanet` metadata: write it with jobs.evaluate") from error
        self.table = table

    @staticmethod
    def read(uri: str | Path) -> "ExitsTable":
        """From a path or s3:// URI."""
        return ExitsTable(read_parquet(uri), uri)

    @property
    def costs(self) -> CostModel:
        """Joules by the recipe's profiles."""
        return cost_model(self.recipe.energy, self.macs)

    def exits(self, split: str, payload: Payload | None = None) -> Exits:
        """The recorded exits of `validation` or `test`."""
        column = f"upload_bytes_{payload or self.recipe.energy.payload}"
        if column not in self.table.column_names:
            raise UserError(f"the exits table has no column {column}: evaluate again with that payload")
        rows = self.table.filter(pa.compute.equal(self.table["split"], split))
        if not rows.num_rows:
            raise UserError(f"the exits table has no {split} rows: evaluate again")
        count = rows.num_rows
        return Exits(
            labels=rows["label"].to_numpy(),
            main_logits=_matrix(rows["main_logits"], count),
            extension_logits=_matrix(rows["extension_logits"], count),
            cloud_pred=rows["cloud_pred"].to_numpy(),
            upload_bytes=rows[column].to_numpy(),
            hard_classes=self.hard_classes,
        )

    def index(self, split: str) -> Ints:
        """The data set's rows behind `exits(split)`, in the same order."""
        mask = pa.compute.equal(self.table["split"], split)
        index: Ints = self.table.filter(mask)["index"].to_numpy()
        return index


def _matrix(column: pa.ChunkedArray, count: int) -> Any:
    return column.combine_chunks().flatten().to_numpy().reshape(count, -1)
