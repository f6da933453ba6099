"""Policies with a threshold a class: too many to enumerate, so they are sampled, from points of the exact front on.

A class's threshold is given by its level: the share of the validation samples predicted as that class that stays on
the edge. Levels mean the same for every measure of complexity and every class.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use. No Ray: a trial is a plain function.
"""

import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from meanet.config import EnergyConfig, Measure, OperatingPointConfig
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.fronts import choose, pareto_front
from meanet.operating_point import Swept, describe, policy_of, sweep
from meanet.replay import Exits, Outcome, Replayer
from meanet.routing import (
    GATES,
    MEASURES,
    Floats,
    Ints,
    Policy,
    Routed,
    complexity,
    is_hard,
    read_extension,
    read_main,
    settle,
)
from meanet.study import FrontPoint, Measured, Params, Reference, Trial, measure, read_trial, trial_id, write_trial
from meanet.thresholds import Points, midway

MEASURE, SIZE = "measure", "num_hard_classes"


def level_name(class_id: int) -> str:
    """The parameter of a class's level."""
    return f"level.{class_id}"


class Levels:
    """Levels <-> thresholds, over one split's recorded exits."""

    def __init__(self, exits: Exits) -> None:
        self.exits = exits
        self._scores = lru_cache(maxsize=256)(self._compute)

    def _compute(self, by: Measure, size: int) -> Floats:
        """(N,) complexity of each sample, as the rule compares it with k = `size` classes in use."""
        policy = Policy(hard_classes=self.exits.hard_classes[:size])
        score = complexity(self._main, by).copy()
        if by == "accepted_entropy" and size:
            rows = np.flatnonzero(is_hard(self._main, policy))
            own = self._main.take(rows)
            settled = settle(own, read_extension(self.exits.extension_logits[rows], policy))
            score[rows] = np.where(np.isinf(own.entropy), np.inf, settled.entropy)
        return score

    @cached_property
    def _main(self) -> Any:
        return read_main(self.exits.main_logits, Policy())

    @cached_property
    def _rows(self) -> list[Ints]:
        """Samples by the class that main predicts."""
        return [np.flatnonzero(self._main.pred == class_id) for class_id in range(self.exits.num_classes)]

    def policy(self, params: Params) -> Policy:
        """The policy of a configuration."""
        by, size = _measure(params), int(params[SIZE])
        score = self._scores(by, size)
        levels = [float(params[level_name(class_id)]) for class_id in range(self.exits.num_classes)]
        thresholds = tuple(
            _threshold(np.sort(score[rows] if len(rows) else score), level)  # a class that is never predicted: of all
            for rows, level in zip(self._rows, levels, strict=True)
        )
        hard = self.exits.hard_classes[:size]
        return Policy(gate="per_class", thresholds=thresholds, hard_classes=hard, measures=(by,))

    def params(self, policy: Policy) -> Params:
        """The configuration that sends the same samples to the cloud as a policy of one measure and one threshold."""
        by, size = policy.measures[0], len(policy.hard_classes)
        score = self._scores(by, size)
        limit = np.inf if policy.threshold is None else policy.threshold
        levels = [float((score[rows] <= limit).mean()) if len(rows) else 1.0 for rows in self._rows]
        named: Params = {level_name(class_id): level for class_id, level in enumerate(levels)}
        return {MEASURE: by, SIZE: size, **named}


def _measure(params: Params) -> Measure:
    return MEASURES[MEASURES.index(params[MEASURE])]


def _threshold(sorted_score: Floats, level: float) -> float | None:
    """What keeps that share of sorted scores, rounded to whole samples; None keeps all."""
    kept = np.array([round(level * len(sorted_score))])
    value = float(midway(sorted_score, kept)[0])
    return None if np.isinf(value) else value


@dataclass(frozen=True)
class ExactFront:
    """What every policy of one measure and one threshold can do: where the sampled search begins."""

    swept: Swept
    """All that were compared."""
    front: list[FrontPoint]
    """Cheapest first."""
    policies: list[Policy]
    """Of the front's points."""
    chosen: Policy
    """What the constraint chooses among them; the best single point where it cannot be kept."""


def exact_front(exits: Exits, costs: CostModel, constraint: OperatingPointConfig, reference: Reference) -> ExactFront:
    """The exact one-threshold front of recorded exits."""
    swept = sweep(exits, costs, MEASURES, confidence=constraint.confidence)
    front = pareto_front(swept.points)
    policies = [policy_of(front, row, exits.hard_classes) for row in range(len(front))]
    points = [
        _front_point(front, row, policy.gate, policy.thresholds, len(policy.hard_classes))
        for row, policy in enumerate(policies)
    ]
    try:
        chosen = policy_of(choose(swept.points, constraint), 0, exits.hard_classes)
    except UserError:
        chosen = policies[int(np.argmax(reference.areas(front.accuracy, front.joules)))]
    return ExactFront(swept, points, policies, chosen)


def starts(exits: Exits, exact: ExactFront, count: int) -> tuple[Params, ...]:
    """Up to `count` configurations to begin with: the chosen policy, then points spread over the exact front."""
    levels = Levels(exits)
    spread = np.linspace(0, len(exact.policies) - 1, min(count, len(exact.policies)))
    policies = [exact.chosen, *(exact.policies[round(place)] for place in spread)]
    found = {trial_id(params): params for params in map(levels.params, policies)}
    return tuple(found.values())[: max(1, count)]


def _front_point(points: Points, row: int, gate: str, thresholds: tuple[float | None, ...], size: int) -> FrontPoint:
    return FrontPoint(
        accuracy=float(points.accuracy[row]),
        joules=float(points.joules[row]),
        cloud_share=float(points.cloud_share[row]),
        gate=gate,
        thresholds=thresholds,
        scaled=False,
        num_hard_classes=size,
    )


@dataclass(frozen=True)
class Evaluation:
    """A trial of the sampled search: replay one policy on validation and leave its record. It travels to the trials."""

    exits: Exits
    """On validation."""
    costs: CostModel
    energy: EnergyConfig
    """Profiles behind the costs."""
    constraint: OperatingPointConfig
    reference: Reference
    trials: str
    """Folder of the trials' records."""
    run: str | None
    """MLflow run of the study."""

    def __call__(self, params: Params) -> Measured:
        """The policy's figures."""
        folder = Path(self.trials) / trial_id(params)
        done = read_trial(folder)
        if done is None:
            done = self._evaluate(params)
            write_trial(done, folder)
        return done.measured

    def _evaluate(self, params: Params) -> Trial:
        started = time.time()
        policy = Levels(self.exits).policy(params)
        replayer = Replayer(self.exits, self.costs)
        routed, outcome = replayer.route(policy), replayer.replay(policy)
        points = one_point(self.exits, policy, routed, outcome)
        point = _front_point(points, 0, policy.gate, (), len(policy.hard_classes))
        try:
            choose(points, self.constraint)
            described: dict[str, Any] | None = describe(policy, outcome, self.constraint, self.energy, self.run)
        except UserError:  # a policy that misses the bounds may still be of the front
            described = None
        return Trial(
            id=trial_id(params),
            params=params,
            state="finished",
            measured=measure([point], self.reference),
            front=(point,),
            hard_classes=self.exits.hard_classes,
            operating_point=described,
            seconds=time.time() - started,
            ended=time.time(),
        )


def one_point(exits: Exits, policy: Policy, routed: Routed, outcome: Outcome) -> Points:
    """A replayed policy as the one point of a `Points`, so that constraints are kept as in the exact search."""
    right, cloud = routed.pred == exits.labels, exits.cloud_pred == exits.labels
    lost = cloud.astype(np.float64) - right
    count = exits.num_samples
    by = MEASURES.index(policy.measures[0])
    values: dict[str, Any] = {
        "gate": GATES.index(policy.gate),
        "measure": by,
        "measure_hard": by,
        "threshold": np.nan,
        "threshold_hard": np.nan,
        "scaled": False,
        "num_hard_classes": len(policy.hard_classes),
        "accuracy": outcome.accuracy,
        "accuracy_deviation": float(right.std()) / np.sqrt(count),
        "joules": outcome.total_joules,
        "seconds": outcome.seconds,
        "cloud_share": outcome.share["cloud"],
        "loss_vs_cloud": float(lost.mean()),
        "loss_deviation": float(lost.std()) / np.sqrt(count),
    }
    return Points(**{name: np.array([value]) for name, value in values.items()})
