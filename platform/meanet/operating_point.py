"""Which policy a model is served under: chosen on validation, reported on test."""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from meanet.config import Gate, OperatingPointConfig
from meanet.evaluation import ExitsTable
from meanet.routing import Policy
from meanet.thresholds import Outcome, Points, choose, pareto_front, replay, sweep


@dataclass(frozen=True)
class Search:
    """What the exact search found."""

    points: int
    """How many policies were compared."""
    seconds: float
    """Wall time of the comparison."""
    front: Points
    """Each gate's accuracy-joules front on validation."""
    chosen: dict[str, Any]
    """The operating point."""

    def to_dict(self, table: ExitsTable) -> dict[str, Any]:
        """The answer of `jobs.sweep --json`: each point of the front on validation, and on test beside it."""
        test, costs = table.exits("test"), table.costs
        rows = []
        for row in range(len(self.front)):
            policy = policy_of(self.front, row, table.hard_classes)
            figures = replay(test, costs, policy)
            rows.append(
                {
                    "gate": policy.gate,
                    "thresholds": list(policy.thresholds),
                    "num_hard_classes": len(policy.hard_classes),
                    "accuracy": float(self.front.accuracy[row]),
                    "joules": float(self.front.joules[row]),
                    "cloud_share": float(self.front.cloud_share[row]),
                    "split": "validation",
                    "test": {
                        "accuracy": figures.accuracy,
                        "joules": figures.total_joules,
                        "cloud_share": figures.share["cloud"],
                    },
                }
            )
        return {"points": self.points, "seconds": self.seconds, "front": rows, "operating_point": self.chosen}


def search(
    table: ExitsTable,
    constraint: OperatingPointConfig,
    gates: Iterable[Gate],
    split_sizes: Iterable[int] | None = None,
    run: str | None = None,
) -> Search:
    """Compare every policy on validation and choose the operating point.

    Args:
        table: recorded exits.
        constraint: how far below cloud-only the point may lie.
        gates: complexities to compare with a threshold.
        split_sizes: numbers of hard classes in use; None = 1..H.
        run: id of the run that made the table.
    """
    validation, costs = table.exits("validation"), table.costs
    started = time.perf_counter()
    points = sweep(validation, costs, gates, split_sizes)
    chosen = choose(points, constraint.max_accuracy_loss_vs_cloud, constraint.confidence)
    seconds = time.perf_counter() - started
    fronts = [pareto_front(points.take(points.gate == gate)) for gate in np.unique(points.gate)]
    policy = policy_of(chosen, 0, table.hard_classes)
    described = describe(policy, replay(validation, costs, policy), constraint, run)
    return Search(len(points), seconds, Points.join(fronts), described)


def policy_of(points: Points, row: int, hard_classes: tuple[int, ...]) -> Policy:
    """One point as a policy."""
    threshold = float(points.threshold[row])
    gate: Any = str(points.gate[row])
    return Policy(
        gate=gate,
        thresholds=(None if np.isinf(threshold) else threshold,),
        hard_classes=hard_classes[: int(points.num_hard_classes[row])],
    )


def describe(policy: Policy, expected: Outcome, constraint: OperatingPointConfig, run: str | None) -> dict[str, Any]:
    """The operating point's JSON: the policy, and what it is expected to do by the split that it was chosen on."""
    return {
        "id": policy_id(policy),
        **policy.to_dict(),
        "split": "validation",
        "expected": {
            "accuracy": expected.accuracy,
            "share": expected.share,
            "joules": expected.joules,
            "joules_source": expected.joules_source,
            "bytes_uploaded": expected.bytes_uploaded,
        },
        "constraint": {
            "max_accuracy_loss_vs_cloud": constraint.max_accuracy_loss_vs_cloud,
            "confidence": constraint.confidence,
            "objective": "min joules",
        },
        "run": run,
    }


def policy_id(policy: Policy) -> str:
    """8 hex digits of the policy's content: the same policy has the same id everywhere."""
    return hashlib.sha256(json.dumps(policy.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
