"""What an operating point was chosen from, small enough to go with the model: for whoever wonders about another one.

Pure arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from meanet.edges import Recorded
from meanet.energy import CostModel
from meanet.fronts import pareto_front
from meanet.replay import Exits
from meanet.routing import GATES, MEASURES, Ints, Policy
from meanet.thresholds import Points, every_point

ALONG, FRONT = 36, 24
"""Points at most."""


def spread(rows: Ints, count: int | None) -> Ints:
    """So many of these at most, the first and the last among them."""
    if count is None or len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def tradeoff(
    exits: Exits, costs: CostModel, policy: Policy, front: Points, row_of: Callable[[Points, int], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The points about an operating point, all on the split that it was chosen on.

    Args:
        exits: that split's.
        costs: joules and seconds.
        policy: the operating point.
        front: every gate's accuracy-joules front.
        row_of: a point as a dict.

    Returns:
        `along`: the operating point's gate and split under other thresholds, from the edge's end to the cloud's, the
        point itself among them; `front`: what nothing beats in accuracy and joules, cheapest first.
    """
    along, best = _along(exits, costs, policy, front), pareto_front(front)
    return {
        "along": [row_of(along, row) for row in range(len(along))],
        "front": [row_of(best, int(row)) for row in spread(np.arange(len(best)), FRONT)],
    }


def _along(exits: Exits, costs: CostModel, policy: Policy, front: Points) -> Points:
    recorded = Recorded(exits, costs, policy.temperatures)
    size = len(policy.hard_classes)
    if policy.gate in MEASURES:
        every = every_point(recorded, policy.gate, size)
        every = every.take(np.lexsort((-every.threshold, every.cloud_share)))
    else:  # of two thresholds, those pairs that are on the gate's own front
        same = (front.gate == GATES.index(policy.gate)) & (front.num_hard_classes == size)
        every = front.take(same & (front.scaled == recorded.scaled))
        every = every.take(np.argsort(every.cloud_share, kind="stable"))
    own = np.inf if policy.thresholds[0] is None else policy.thresholds[0]
    itself = np.flatnonzero(every.threshold == own)
    return every.take(np.union1d(spread(np.arange(len(every)), ALONG), itself[:1]))
