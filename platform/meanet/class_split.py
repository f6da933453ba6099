"""Which classes are hard (MEANet, section IV): those that the main exit predicts with the lowest precision.

Shape letters: N samples, C classes. Pure numpy.
"""

import numpy as np
from numpy.typing import NDArray

from meanet.routing import Ints


def class_precision(pred: Ints, labels: Ints, num_classes: int) -> NDArray[np.float64]:
    """(C,) correct / predicted-as-that-class of (N,) answers; the denominator starts at 1, so unpredicted is 0."""
    correct = np.bincount(labels[pred == labels], minlength=num_classes)
    return correct / (1 + np.bincount(pred, minlength=num_classes))


def hardest_classes(precision: NDArray[np.float64], num_hard: int) -> list[int]:
    """The classes of lowest precision, hardest first; equals in order of their ids."""
    return [int(class_id) for class_id in np.argsort(precision, kind="stable")[:num_hard]]
