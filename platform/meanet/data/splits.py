"""Train, validation and test: stratified, seeded, disjoint. Nothing is ever chosen on test."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meanet.config import DataConfig
from meanet.data.table import Images
from meanet.errors import UserError


@dataclass(frozen=True)
class Splits:
    """One table and the rows of it that each split holds."""

    table: Images
    """Everything."""
    train: NDArray[np.int64]
    """Rows to train on."""
    validation: NDArray[np.int64]
    """Rows to choose on: hard classes, thresholds, epochs."""
    test: NDArray[np.int64]
    """Rows to report on."""


def divide(table: Images, config: DataConfig, seed: int) -> Splits:
    """Divide class by class, so that every split has every class in its share.

    Raises:
        UserError: a class has too few images to stand in all three splits.
    """
    generator = np.random.default_rng(seed)
    given = table.test_rows
    is_test = np.zeros(len(table.labels), dtype=bool)
    is_test[[] if given is None else given] = True
    parts: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": [], "test": []}
    for class_id, name in enumerate(table.class_names):
        rows = generator.permutation(np.flatnonzero((table.labels == class_id) & ~is_test))
        num_test = round(len(rows) * config.test_fraction) if given is None else 0
        num_validation = round(len(rows) * config.validation_fraction)
        own = np.flatnonzero((table.labels == class_id) & is_test) if given is not None else rows[:num_test]
        if min(len(own), num_validation, len(rows) - num_test - num_validation) < 1:
            raise UserError(
                f"class {name!r} has {len(rows) + int(is_test[table.labels == class_id].sum())} images, too few for "
                "training, validation and test: add images, or change data.validation_fraction and data.test_fraction"
            )
        parts["test"].append(own)
        parts["validation"].append(rows[num_test : num_test + num_validation])
        parts["train"].append(rows[num_test + num_validation :])
    sorted_parts = {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}
    return Splits(table, **sorted_parts)
