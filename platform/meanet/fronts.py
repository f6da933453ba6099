"""What is best among many operating points: fronts, and the one point that a user's constraints choose. Pure arrays."""

from statistics import NormalDist

import numpy as np

from meanet.config import OperatingPointConfig
from meanet.errors import UserError
from meanet.routing import Bools, Floats, Ints
from meanet.thresholds import Points, promising

_ROUNDING = 1e-12


def pareto_front(points: Points) -> Points:
    """The points that no other one beats in both accuracy (more) and joules (less), cheapest first."""
    rows = promising(points.accuracy, points.joules)
    order = rows[np.lexsort((points.cloud_share[rows], -points.accuracy[rows], points.joules[rows]))]
    accuracy = points.accuracy[order]
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(accuracy)[:-1]))
    return points.take(order[accuracy > best_before])


def pareto_set(points: Points) -> Points:
    """The points that no other one beats in accuracy, joules, cloud share and latency together, cheapest first.

    Of points that are equal in all four, one is kept.
    """
    order = np.lexsort((points.seconds, points.cloud_share, -points.accuracy, points.joules))
    costs = np.stack((-points.accuracy, points.cloud_share, points.seconds), axis=1)[order]
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, len(order), 512):  # none is beaten by a later one: those cost as many joules or more
        rows = np.arange(start, min(start + 512, len(order)))
        rows = rows[~_beaten(costs[rows], costs[kept])]
        inside = (costs[rows][None] <= costs[rows][:, None]).all(axis=2)  # [i, j]: j is as good as i
        rows = rows[~np.tril(inside, k=-1).any(axis=1)]
        kept = np.concatenate((kept, rows))
    return points.take(order[kept])


def _beaten(costs: Floats, by: Floats) -> Bools:
    """(P,) whether some row of `by` is at most this one in every column."""
    beaten = np.zeros(len(costs), dtype=bool)
    for start in range(0, len(by), 4096):
        part = by[start : start + 4096]
        as_good = part[None, :, 0] <= costs[:, None, 0]
        for column in range(1, costs.shape[1]):
            as_good &= part[None, :, column] <= costs[:, None, column]
        beaten |= as_good.any(axis=1)
    return beaten


def hypervolume(accuracy: Floats, joules: Floats, worst_accuracy: float, worst_joules: float) -> float:
    """Share of the area between the worst point and (1, 0 J) that these dominate, 0..1 (Zitzler & Thiele 1998)."""
    inside = (accuracy > worst_accuracy) & (joules < worst_joules)
    order = np.argsort(joules[inside])
    height = np.maximum.accumulate(accuracy[inside][order]) - worst_accuracy
    width = np.diff(np.append(joules[inside][order], worst_joules))
    return float((height * width).sum() / ((1 - worst_accuracy) * worst_joules))


def choose(points: Points, constraint: OperatingPointConfig) -> Points:
    """The one point that the constraints choose: the cheapest where accuracy is bounded, else the most accurate.

    Bounds on accuracy are one-sided and normal, the loss's on the paired differences between cascade and cloud: with
    thousands of points to choose from, the one that merely looks best on a few hundred samples would disappoint on
    others.

    Args:
        points: of one split.
        constraint: bounds, and how sure of those on accuracy one must be.

    Raises:
        UserError: no point keeps them all; it says how close each can be come to.
    """
    missing = shortfalls(points, constraint)
    kept = [np.ones(len(points), dtype=bool), *(value <= _ROUNDING for value in missing.values())]
    allowed = np.all(kept, axis=0)
    if not allowed.any():
        raise UserError(_how_close(points, constraint, missing))
    index = np.flatnonzero(allowed)
    joules, accuracy = points.joules[index], points.accuracy[index]
    keys = (-accuracy, joules) if constraint.bounds_accuracy else (joules, -accuracy)
    best: Ints = np.lexsort((points.cloud_share[index], *keys))[:1]
    return points.take(index[best])


def shortfalls(points: Points, constraint: OperatingPointConfig) -> dict[str, Floats]:
    """(P,) by how much each point misses each bound that stands; at most 0 where it keeps it."""
    z = NormalDist().inv_cdf(constraint.confidence)
    values = {
        "max_accuracy_loss_vs_cloud": points.loss_vs_cloud + z * points.loss_deviation,
        "min_accuracy": points.accuracy - z * points.accuracy_deviation,
        "max_energy": points.joules,
        "max_cloud_share": points.cloud_share,
        "max_latency": points.seconds,
    }
    return {
        name: (bound - values[name]) if name == "min_accuracy" else (values[name] - bound)
        for name, bound in constraint.bounds.items()
    }


_WORDS = {
    "max_accuracy_loss_vs_cloud": "the loss against cloud-only can come down to {:.4f}",
    "min_accuracy": "accuracy can reach {:.4f}",
    "max_energy": "energy can come down to {:.4g} J an image",
    "max_cloud_share": "the cloud share can come down to {:.4f}",
    "max_latency": "latency can come down to {:.4g} s",
}


def _how_close(points: Points, constraint: OperatingPointConfig, missing: dict[str, Floats]) -> str:
    asked = ", ".join(f"{name.replace('_', '-')} {bound:g}" for name, bound in constraint.bounds.items())
    reachable = []
    for name, bound in constraint.bounds.items():
        others = [value <= _ROUNDING for other, value in missing.items() if other != name]
        kept = np.all(others, axis=0) if others else np.ones(len(points), dtype=bool)
        if not kept.any():
            continue
        least = missing[name][kept].min()
        reached = bound - least if name == "min_accuracy" else bound + least
        reachable.append(_WORDS[name].format(reached))
    sure = f" with {constraint.confidence:.0%} confidence" if constraint.bounds_accuracy else ""
    close = "; ".join(reachable) or "no two of them can be kept together"
    rest = " with the others kept" if len(constraint.bounds) > 1 and reachable else ""
    return (
        f"no policy keeps {asked}{sure}. How close one comes: {close}{rest}. Loosen a bound, or train another split or "
        "network"
    )
