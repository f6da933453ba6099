"""The exact search: every distinct threshold x every gate x every split size, over recorded exits.

For one gate and one split size, sort by complexity once; what stays on the edge at a threshold is a prefix, so that
accuracy, joules and cloud share of all thresholds are prefix sums. No network runs and nothing is sampled.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use, P points. Pure arrays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from meanet.config import Gate
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.routing import (
    Bools,
    Exit,
    Floats,
    Ints,
    Policy,
    Reading,
    Routed,
    complexity,
    is_hard,
    read_extension,
    read_main,
    route,
    settle,
)


@dataclass(frozen=True)
class Exits:
    """What every exit said of N samples of one split: all that a policy can be replayed from."""

    labels: Ints
    """(N,) true class ids."""
    main_logits: NDArray[np.float32]
    """(N, C)."""
    extension_logits: NDArray[np.float32]
    """(N, H), hardest class first."""
    cloud_pred: Ints
    """(N,) class ids."""
    upload_bytes: Ints
    """(N,) bytes that go to the cloud if the sample does."""
    hard_classes: tuple[int, ...]
    """H class ids, hardest first."""

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.labels)


@dataclass(frozen=True)
class Points:
    """P operating points, one an element of every array."""

    gate: NDArray[np.str_]
    """(P,)"""
    threshold: Floats
    """(P,) infinite = never to the cloud."""
    num_hard_classes: Ints
    """(P,) k."""
    accuracy: Floats
    """(P,) 0..1."""
    joules: Floats
    """(P,) of the edge device, J per image."""
    cloud_share: Floats
    """(P,) 0..1."""
    loss_vs_cloud: Floats
    """(P,) cloud-only's accuracy minus this one, -1..1."""
    loss_deviation: Floats
    """(P,) standard error of that loss: of the mean of N paired differences."""

    def __len__(self) -> int:
        return len(self.threshold)

    def take(self, index: Ints | Bools) -> "Points":
        """These points only."""
        return Points(**{name: values[index] for name, values in vars(self).items()})

    @staticmethod
    def join(parts: Sequence["Points"]) -> "Points":
        """All points of all parts."""
        return Points(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Outcome:
    """One policy over one split; figures are per image."""

    accuracy: float
    """0..1."""
    accuracy_hard_classes: float
    """0..1, of samples whose true class is hard."""
    share: dict[str, float]
    """By exit, 0..1."""
    macs_edge: float
    """Multiply-accumulates on the device."""
    bytes_uploaded: float
    """Bytes."""
    joules: dict[str, float]
    """edge_compute and upload, J."""
    joules_source: str
    """`modelled:<profiles>`."""

    @property
    def total_joules(self) -> float:
        """J per image; both parts carry the same tag."""
        return sum(self.joules.values())


def sweep_gate(exits: Exits, costs: CostModel, gate: Gate, num_hard: int) -> Points:
    """Every distinct threshold of one gate with the `num_hard` hardest classes: P <= N + 1 points.

    Each threshold lies midway between neighbouring recorded values, so that rounding cannot move a sample.
    """
    policy = Policy(gate=gate, hard_classes=exits.hard_classes[:num_hard])
    main = read_main(exits.main_logits, policy)
    edge_right, edge_joules = _edge_outcome(exits, costs, policy, main)
    cloud_right = exits.cloud_pred == exits.labels
    cloud_joules = costs.main_joules + costs.upload_joules(exits.upload_bytes)
    score = complexity(main, gate)
    order = np.argsort(score, kind="stable")
    ends = np.flatnonzero(score[order][1:] != score[order][:-1]) + 1  # where ties end
    kept = np.concatenate(([0], ends, [exits.num_samples]))
    difference = cloud_right[order].astype(np.float64) - edge_right[order]  # what staying on the edge loses
    nothing = np.zeros(exits.num_samples)
    loss = _prefix_mean(difference, nothing)[kept]
    variance = _prefix_mean(difference**2, nothing)[kept] - loss**2
    return Points(
        gate=np.full(len(kept), gate),
        threshold=_midway(score[order], kept),
        num_hard_classes=np.full(len(kept), num_hard),
        accuracy=cloud_right.mean() - loss,
        joules=_prefix_mean(edge_joules[order], cloud_joules[order])[kept],
        cloud_share=1 - kept / exits.num_samples,
        loss_vs_cloud=loss,
        loss_deviation=np.sqrt(np.maximum(variance, 0.0) / exits.num_samples),
    )


def _edge_outcome(exits: Exits, costs: CostModel, policy: Policy, main: Reading) -> tuple[Bools, Floats]:
    """(N,) whether the edge alone is right, and what it pays, J."""
    hard = is_hard(main, policy)
    pred = main.pred
    if policy.hard_classes:
        settled = settle(main, read_extension(exits.extension_logits, policy))
        pred = np.where(hard, settled.pred, main.pred)
    joules: Floats = costs.main_joules + hard.astype(np.float64) * costs.extension_joules
    return pred == exits.labels, joules


def _prefix_mean(edge: NDArray[np.generic], cloud: NDArray[np.generic]) -> Floats:
    """(N + 1,) mean when the first i samples take their edge value and the others their cloud value."""
    edge_sum = np.concatenate(([0.0], np.cumsum(edge, dtype=np.float64)))
    cloud_sum = np.concatenate(([0.0], np.cumsum(cloud, dtype=np.float64)))
    mean: Floats = (edge_sum + cloud_sum[-1] - cloud_sum) / len(edge)
    return mean


def _midway(score: Floats, kept: Ints) -> Floats:
    """Thresholds that keep the first `kept` of sorted scores: s[i-1] <= t < s[i]."""
    last_kept = score[np.maximum(kept - 1, 0)]
    first_gone = score[np.minimum(kept, len(score) - 1)]
    with np.errstate(invalid="ignore"):
        middle = last_kept + (first_gone - last_kept) / 2
    middle = np.where(middle >= first_gone, last_kept, middle)
    middle = np.where(np.isinf(first_gone) & np.isfinite(last_kept), last_kept + 1.0, middle)
    middle = np.where(kept == 0, np.minimum(score[0], 0.0) - 1.0, middle)
    return np.where(kept == len(score), np.inf, middle)


def sweep(exits: Exits, costs: CostModel, gates: Iterable[Gate], split_sizes: Iterable[int] | None = None) -> Points:
    """Every distinct threshold of every gate and split size.

    Args:
        exits: recorded exits of one split.
        costs: joules.
        gates: which complexities to compare with a threshold.
        split_sizes: numbers of hard classes k in use; all of 1..H if None.

    Raises:
        UserError: a split size that the trained extension does not have; no samples.
    """
    sizes = list(range(1, len(exits.hard_classes) + 1) if split_sizes is None else split_sizes)
    if not exits.num_samples:
        raise UserError("the exits table has no samples of that split: evaluate again")
    wrong = [size for size in sizes if not 0 <= size <= len(exits.hard_classes)]
    if wrong or not sizes:
        raise UserError(f"split sizes {wrong or sizes}: choose from 0..{len(exits.hard_classes)}, the trained size")
    return Points.join([sweep_gate(exits, costs, gate, size) for gate in gates for size in sizes])


def pareto_front(points: Points) -> Points:
    """The points that no other one beats in both accuracy (more) and joules (less), cheapest first."""
    order = np.lexsort((points.cloud_share, -points.accuracy, points.joules))
    accuracy = points.accuracy[order]
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(accuracy)[:-1]))
    return points.take(order[accuracy > best_before])


def choose(points: Points, max_loss: float, confidence: float = 0.5) -> Points:
    """The one cheapest point that is, with that confidence, at most `max_loss` less accurate than cloud-only.

    The bound is one-sided and normal, on the paired differences between cascade and cloud: with thousands of points to
    choose from, the one that merely looks best on a few hundred samples would disappoint on others.

    Args:
        points: of one split.
        max_loss: 0..1.
        confidence: 0.5 (the estimate itself) to 1, excluded.
    """
    bound = points.loss_vs_cloud + NormalDist().inv_cdf(confidence) * points.loss_deviation
    enough = points.take(bound <= max_loss + 1e-12)  # never empty: sending everything loses nothing
    return pareto_front(enough).take(np.array([0]))


def replay(exits: Exits, costs: CostModel, policy: Policy) -> Outcome:
    """One policy over recorded exits, sample by sample through the one exit rule."""
    return outcome(exits, costs, route(exits.main_logits, exits.extension_logits, exits.cloud_pred, policy))


def outcome(exits: Exits, costs: CostModel, routed: Routed, *, main_runs: bool = True) -> Outcome:
    """What it costs and yields that these exits answered.

    Args:
        exits: recorded exits.
        costs: joules and MACs.
        routed: who answered each sample.
        main_runs: False for cloud-only, where the device computes nothing.
    """
    right = routed.pred == exits.labels
    hard = np.isin(exits.labels, exits.hard_classes)
    extended, gone = routed.exit == Exit.EXTENSION, routed.exit == Exit.CLOUD
    macs = costs.macs.main * main_runs + extended.mean() * (costs.macs.adaptive + costs.macs.extension)
    return Outcome(
        accuracy=float(right.mean()),
        accuracy_hard_classes=float(right[hard].mean()) if hard.any() else float("nan"),
        share={exit_.label: float((routed.exit == exit_).mean()) for exit_ in Exit},
        macs_edge=float(macs),
        bytes_uploaded=float((gone * exits.upload_bytes).mean()),
        joules={
            "edge_compute": float(macs * costs.device.joules_per_mac),
            "upload": float((gone * costs.upload_joules(exits.upload_bytes)).mean()),
        },
        joules_source=costs.tag,
    )
