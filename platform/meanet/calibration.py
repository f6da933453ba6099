"""Temperature scaling (Guo et al., arXiv 1706.04599): one number that divides an exit's logits, fitted on validation.

The main exit's softmax spans C classes and the extension's H: raw, their confidences are not on one scale.

Shape letters: N samples, C classes. Pure arrays.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from meanet.replay import Exits
from meanet.routing import Floats, Ints

_LOWEST, _HIGHEST = 0.05, 20.0


def temperature(logits: NDArray[np.floating[Any]], columns: Ints) -> float:
    """The temperature of least negative log-likelihood, 0.05..20; 1 where there is nothing to fit on.

    Args:
        logits: (N, C); rows that are not finite are left out.
        columns: (N,) the right column of each row.
    """
    finite = np.isfinite(logits).all(axis=1)
    scores: Floats = np.asarray(logits[finite], dtype=np.float64)
    right = columns[finite]
    if not len(right) or scores.shape[1] < 2:
        return 1.0
    scores -= scores.max(axis=1, keepdims=True)
    picked = scores[np.arange(len(right)), right]

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float((np.log(np.exp(scores * inverse).sum(axis=1)) - picked * inverse).mean())

    found = minimize_scalar(loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.round(np.exp(found.x), 6))


def fit_temperatures(exits: Exits) -> dict[str, float]:
    """Of the main exit over all samples, and of the extension exit over those of the hard classes it was trained on."""
    place = np.full(exits.num_classes, -1, dtype=np.int64)
    place[list(exits.hard_classes)] = np.arange(len(exits.hard_classes))
    columns = place[exits.labels]
    hard = columns >= 0
    return {
        "main": temperature(exits.main_logits, exits.labels),
        "extension": temperature(exits.extension_logits[hard], columns[hard]),
    }
