"""Which policy a model is served under: chosen on validation, reported on test."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from meanet.bootstrap import intervals
from meanet.calibration import fit_temperatures
from meanet.config import EnergyConfig, Gate, OperatingPointConfig
from meanet.edges import UNSCALED, Recorded
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.fronts import choose, pareto_front, pareto_set
from meanet.replay import Exits, Outcome, Replayer, replay
from meanet.routing import GATES, MEASURES, Bools, Floats, Policy, policy_id
from meanet.thresholds import Points, check_sizes, sweep_gate
from meanet.tradeoff import spread, tradeoff
from meanet.two_gate import sweep_two_gates


@dataclass(frozen=True)
class PolicySpace:
    """Every distinct threshold of each gate, at each split size."""

    gates: tuple[Gate, ...]
    """Measures of complexity, and `two_gate`."""
    smallest_split: int = 0
    """Fewest hard classes in use; the most are the trained H."""
    scaled: bool = False
    """Each gate with temperature-scaled logits, too."""

    def sizes(self, trained: int) -> range:
        """Split sizes of a model whose extension was trained on so many hard classes."""
        return range(min(self.smallest_split, trained), trained + 1)


@dataclass(frozen=True)
class Swept:
    """What comparing every policy of some gates left."""

    compared: int
    """How many policies were compared."""
    points: Points
    """Those that a constraint or a front could choose."""
    temperatures: dict[str, float]
    """Of the scaled ones."""


def sweep(
    exits: Exits,
    costs: CostModel,
    gates: Iterable[Gate],
    split_sizes: Iterable[int] | None = None,
    *,
    scaled: bool = False,
    confidence: float = 0.5,
) -> Swept:
    """Compare every distinct threshold of every gate and split size.

    Args:
        exits: recorded exits of one split.
        costs: joules and seconds.
        gates: measures, and `two_gate`.
        split_sizes: numbers of hard classes k in use; all of 0..H if None.
        scaled: whether each gate is searched with temperature-scaled logits, too (fitted on these exits).
        confidence: with which bounds on accuracy will be asked for.

    Raises:
        UserError: a split size that the trained extension does not have; no samples; a gate that cannot be enumerated.
    """
    sizes, gates = check_sizes(exits, split_sizes), list(gates)
    measures = [gate for gate in gates if gate in MEASURES]
    if len(measures) + ("two_gate" in gates) < len(gates) or not gates:
        raise UserError(
            f"gates {gates}: choose of {', '.join(MEASURES)} and two_gate; a threshold a class is too many to compare, "
            "`python -m jobs.tune gates RECIPE` searches them"
        )
    z = NormalDist().inv_cdf(confidence)
    temperatures = fit_temperatures(exits) if scaled else UNSCALED
    compared, parts = 0, []
    for used in (UNSCALED, temperatures) if temperatures != UNSCALED else (UNSCALED,):
        recorded = Recorded(exits, costs, used)
        found: list[tuple[int, Points | None]] = [sweep_gate(recorded, gate, sizes, z) for gate in measures]
        if "two_gate" in gates:
            found.append(sweep_two_gates(recorded, sizes))
        compared += sum(count for count, _ in found)
        parts += [points for _, points in found if points is not None]
    if not parts:
        raise UserError(f"split sizes {sizes}: two_gate needs hard classes in use; add a size above 0")
    return Swept(compared, Points.join(parts), temperatures)


@dataclass(frozen=True)
class Search:
    """What the exact search found."""

    points: int
    """How many policies were compared."""
    seconds: float
    """Wall time of the comparison."""
    front: Points
    """Each gate's accuracy-joules front on validation."""
    pareto: Points
    """What nothing beats in accuracy, joules, cloud share and latency together, over all gates, on validation."""
    temperatures: dict[str, float]
    """Of the points that are scaled."""
    chosen: dict[str, Any]
    """The operating point."""

    def to_dict(self, table: ExitsTable, per_front: int | None = None) -> dict[str, Any]:
        """The answer of `jobs.sweep --json`: each point of the fronts on validation, and on test beside it.

        Args:
            table: what was searched.
            per_front: so many points of each front at most, evenly spread; None = all.
        """
        front = self.front.take(
            np.concatenate([spread(np.flatnonzero(rows), per_front) for *_, rows in kinds(self.front)])
        )
        policies = [self.policy(front, row, table) for row in range(len(front))]
        chosen, costs = Policy.from_dict(self.chosen), table.costs
        on = {split: Replayer(table.exits(split), costs) for split in ("validation", "test")}
        sure = {split: intervals(replayer, policies, chosen) for split, replayer in on.items()}
        rows = []
        for row, policy in enumerate(policies):
            figures = on["test"].replay(policy)
            found = sure["validation"]
            rows.append(
                {
                    **_row(front, row, policy),
                    "accuracy_interval": found.accuracy[row].tolist(),
                    "joules_interval": found.joules[row].tolist(),
                    "same_as_operating_point": bool(found.same_as_reference[row]),
                    "split": "validation",
                    "test": {
                        "accuracy": figures.accuracy,
                        "accuracy_interval": sure["test"].accuracy[row].tolist(),
                        "joules": figures.total_joules,
                        "cloud_share": figures.share["cloud"],
                        "latency": figures.seconds,
                    },
                }
            )
        pareto = [_row(self.pareto, row, self.policy(self.pareto, row, table)) for row in range(len(self.pareto))]
        point = on["test"].replay(chosen)
        (accuracy,), (joules,) = (values.tolist() for values in self._on_test(on["test"], chosen))
        return {
            "points": self.points,
            "seconds": self.seconds,
            "joules_source": costs.tag,
            "latency_source": costs.latency_source,
            "operating_point_on_test": {
                "accuracy": point.accuracy,
                "accuracy_interval": accuracy,
                "accuracy_cloud_only": float((on["test"].exits.cloud_pred == on["test"].exits.labels).mean()),
                "joules": point.joules,
                "joules_interval": joules,
                "joules_source": point.joules_source,
                "share": point.share,
                "latency": point.seconds,
            },
            "temperatures": self.temperatures,
            "front": rows,
            "front_size": len(self.front),
            "pareto": pareto,
            "operating_point": self.chosen,
        }

    @staticmethod
    def _on_test(test: Replayer, chosen: Policy) -> tuple[Floats, Floats]:
        found = intervals(test, [chosen], chosen)
        return found.accuracy, found.joules

    def policy(self, points: Points, row: int, table: ExitsTable) -> Policy:
        """One point of this search as a policy."""
        return policy_of(points, row, table.hard_classes, self.temperatures)


def _row(points: Points, row: int, policy: Policy) -> dict[str, Any]:
    return {
        "gate": policy.gate,
        "measures": list(policy.measures),
        "thresholds": list(policy.thresholds),
        "scaled": bool(points.scaled[row]),
        "num_hard_classes": len(policy.hard_classes),
        "accuracy": float(points.accuracy[row]),
        "joules": float(points.joules[row]),
        "cloud_share": float(points.cloud_share[row]),
        "latency": float(points.seconds[row]),
    }


def search(
    table: ExitsTable,
    constraint: OperatingPointConfig,
    gates: Iterable[Gate],
    split_sizes: Iterable[int] | None = None,
    run: str | None = None,
    *,
    scaled: bool = False,
) -> Search:
    """Compare every policy on validation and choose the operating point.

    Args:
        table: recorded exits.
        constraint: what the point must keep.
        gates: measures to compare with a threshold, and `two_gate`.
        split_sizes: numbers of hard classes in use; None = 0..H.
        run: id of the run that made the table.
        scaled: search temperature-scaled logits, too.

    Raises:
        UserError: the constraint cannot be kept; a gate or split size that cannot be searched.
    """
    validation, costs = table.exits("validation"), table.costs
    started = time.perf_counter()
    swept = sweep(validation, costs, gates, split_sizes, scaled=scaled, confidence=constraint.confidence)
    points = swept.points
    chosen = choose(points, constraint)
    fronts = [pareto_front(points.take(rows)) for _, _, rows in kinds(points)]
    pareto = pareto_set(points)
    seconds = time.perf_counter() - started
    policy = policy_of(chosen, 0, table.hard_classes, swept.temperatures)
    described = describe(policy, replay(validation, costs, policy), constraint, table.energy, run)
    front = Points.join(fronts)

    def row_of(points: Points, row: int) -> dict[str, Any]:
        return _row(points, row, policy_of(points, row, table.hard_classes, swept.temperatures))

    described["tradeoff"] = tradeoff(validation, costs, policy, front, row_of)
    return Search(swept.compared, seconds, front, pareto, swept.temperatures, described)


def kinds(points: Points) -> Iterator[tuple[Gate, bool, Bools]]:
    """Each gate among the points, raw and temperature-scaled apart, with a mask of the points that are of it."""
    for gate in np.unique(points.gate):
        for by in np.unique(points.scaled[points.gate == gate]):
            yield GATES[gate], bool(by), (points.gate == gate) & (points.scaled == by)


def policy_of(
    points: Points, row: int, hard_classes: tuple[int, ...], temperatures: dict[str, float] | None = None
) -> Policy:
    """One point as a policy; `temperatures` are those of scaled points."""

    def threshold(value: float) -> float | None:
        return None if np.isinf(value) else float(value)

    gate = GATES[points.gate[row]]
    thresholds = [threshold(points.threshold[row])]
    measures = [MEASURES[points.measure[row]]]
    if gate == "two_gate":
        thresholds.append(threshold(points.threshold_hard[row]))
        measures.append(MEASURES[points.measure_hard[row]])
    return Policy(
        gate=gate,
        thresholds=tuple(thresholds),
        hard_classes=hard_classes[: int(points.num_hard_classes[row])],
        temperatures=dict(temperatures or UNSCALED) if points.scaled[row] else dict(UNSCALED),
        measures=tuple(measures),
    )


def describe(
    policy: Policy, expected: Outcome, constraint: OperatingPointConfig, energy: EnergyConfig, run: str | None
) -> dict[str, Any]:
    """The operating point's JSON: the policy, what it is expected to do by the split that it was chosen on, and the
    profiles that it was chosen under, by which the server counts joules, too."""
    return {
        "id": policy_id(policy),
        **policy.to_dict(),
        "split": "validation",
        "expected": {
            "accuracy": expected.accuracy,
            "share": expected.share,
            "disagreement": expected.disagreement,
            "joules": expected.joules,
            "joules_source": expected.joules_source,
            "bytes_uploaded": expected.bytes_uploaded,
            "latency": expected.seconds,
        },
        "constraint": {
            **constraint.bounds,
            "confidence": constraint.confidence,
            "objective": "min joules" if constraint.bounds_accuracy else "max accuracy",
        },
        "energy": asdict(energy),
        "run": run,
    }
