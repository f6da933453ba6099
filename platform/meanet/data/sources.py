"""Where images come from: a URI -> an `ImageTable`."""

import numpy as np

from meanet.data.table import ImageTable
from meanet.errors import UserError


def load(source: str) -> ImageTable:
    """Read a whole source into memory.

    Raises:
        UserError: no such source.
    """
    if source == "digits":
        return _digits()
    raise UserError(f"unknown data source {source!r}: known sources are digits")


def _digits() -> ImageTable:
    """scikit-learn's digits: 1,797 scans, (8, 8), 17 grey levels; times 15 they fill a byte without loss.

    Source: https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * 15).astype(np.uint8)[..., np.newaxis]
    return ImageTable(images, bunch.target.astype(np.int64), tuple(str(digit) for digit in range(10)), "digits")
