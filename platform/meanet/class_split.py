"""Which classes are hard, by a validation pass of the main exit (MEANet, section IV; three other choices beside it).

Shape letters: N samples, C classes, H hard classes. Pure numpy.
"""

import numpy as np
from numpy.typing import NDArray

from meanet.config import SplitMethod
from meanet.routing import Ints


def class_precision(pred: Ints, labels: Ints, num_classes: int) -> NDArray[np.float64]:
    """(C,) correct / predicted-as-that-class of (N,) answers; the denominator starts at 1, so unpredicted is 0."""
    correct = np.bincount(labels[pred == labels], minlength=num_classes)
    return correct / (1 + np.bincount(pred, minlength=num_classes))


def class_recall(pred: Ints, labels: Ints, num_classes: int) -> NDArray[np.float64]:
    """(C,) correct / truly-of-that-class of (N,) answers; 0 for a class without samples."""
    correct = np.bincount(labels[pred == labels], minlength=num_classes)
    return correct / np.maximum(1, np.bincount(labels, minlength=num_classes))


def lowest(score: NDArray[np.float64], num_hard: int) -> list[int]:
    """The classes of lowest score, hardest first; equals in order of their ids."""
    return [int(class_id) for class_id in np.argsort(score, kind="stable")[:num_hard]]


def confusion_pairs(pred: Ints, labels: Ints, num_classes: int, num_hard: int) -> list[int]:
    """Colour pairs of classes hard, the most confused pair first, until H classes are.

    What the main exit mixes up then stands on one side of the split, where the extension exit can tell it apart. A pair
    counts both ways; of a pair for which one place is left, the class of lower precision takes it.
    """
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, pred), 1)
    both = np.triu(confusion + confusion.T, k=1)
    precision = class_precision(pred, labels, num_classes)
    coloured: list[int] = []
    for pair in np.argsort(-both, axis=None, kind="stable"):
        for class_id in sorted(divmod(int(pair), num_classes), key=lambda one: (precision[one], one)):
            if class_id not in coloured and len(coloured) < num_hard:
                coloured.append(class_id)
        if len(coloured) == num_hard:
            break
    return coloured


def hard_classes(
    method: SplitMethod, pred: Ints, labels: Ints, *, num_classes: int, num_hard: int, seed: int
) -> list[int]:
    """H class ids, hardest first by the method's own measure; `seed` matters to `random` alone."""
    if method == "lowest_precision":
        return lowest(class_precision(pred, labels, num_classes), num_hard)
    if method == "lowest_recall":
        return lowest(class_recall(pred, labels, num_classes), num_hard)
    if method == "confusion_pairs":
        return confusion_pairs(pred, labels, num_classes, num_hard)
    return [int(class_id) for class_id in np.random.default_rng(seed).permutation(num_classes)[:num_hard]]
