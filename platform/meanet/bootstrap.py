"""How sure a figure is: percentile intervals by bootstrap over samples (Efron & Tibshirani 1993). Pure arrays."""

from dataclasses import dataclass

import numpy as np

from meanet.replay import Replayer, joules_of
from meanet.routing import Bools, Floats, Policy

DRAWS, LEVEL = 1000, 0.95
_BLOCK = 256
"""Policies at a time, so that memory does not grow with their number."""


@dataclass(frozen=True)
class Intervals:
    """Of P policies over one split, at 95%."""

    accuracy: Floats
    """(P, 2) lower and upper end."""
    joules: Floats
    """(P, 2) J an image."""
    same_as_reference: Bools
    """(P,) whether zero lies in the interval of the paired difference in accuracy from the reference policy."""


def intervals(replayer: Replayer, policies: list[Policy], reference: Policy, seed: int = 0) -> Intervals:
    """Draw the split's samples again and again, the same draws for all policies, so that differences are paired."""
    exits = replayer.exits
    count = exits.num_samples
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
    accuracy, joules = [], []
    for start in range(0, len(policies) + 1, _BLOCK):
        routed = [replayer.route(policy) for policy in [*policies, reference][start : start + _BLOCK]]
        accuracy.append(drawn @ np.stack([found.pred == exits.labels for found in routed], axis=1))
        joules.append(drawn @ np.stack([joules_of(exits, replayer.costs, found) for found in routed], axis=1))
    own, other = np.split(np.concatenate(accuracy, axis=1), [len(policies)], axis=1)
    return Intervals(
        accuracy=_ends(own),
        joules=_ends(np.concatenate(joules, axis=1)[:, : len(policies)]),
        same_as_reference=_holds_zero(own - other),
    )


def _ends(draws: Floats) -> Floats:
    ends: Floats = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0).T
    return ends


def _holds_zero(differences: Floats) -> Bools:
    low, high = _ends(differences).T
    holds: Bools = (low <= 0) & (high >= 0)
    return holds
