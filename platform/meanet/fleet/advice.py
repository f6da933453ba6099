"""Where the cloud becomes the bottleneck, and what threshold would move it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meanet.config import Measure
from meanet.edges import Recorded
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.fleet.model import Fleet
from meanet.fleet.outcome import Outcome, Price
from meanet.fleet.rates import curve
from meanet.fleet.run import Mode, Simulator
from meanet.fleet.workload import workload
from meanet.operating_point import policy_of
from meanet.replay import replay
from meanet.routing import MEASURES, Policy
from meanet.thresholds import Points, every_point

DEGRADED = 0.01
"""A share of degraded answers and refused images above which the fleet does not fit its cloud."""
_FULL = 0.9
"""Of the most replicas, where they rather than the autoscaler's delay are to blame."""
_CLOSE = 1.02
"""How closely the number of devices is looked for."""
_ROUNDS = 7
"""Halvings of the cloud share that is looked for."""


def why_not(found: Outcome, most_replicas: int) -> str | None:
    """Why the fleet does not fit its cloud; None if it does."""
    lost = found.degraded + found.share["refused"]
    if found.share["refused"] > DEGRADED:
        return f"edge replicas refuse {found.share['refused']:.1%} of the images: they, not the cloud, are too slow"
    if found.offered_max > 1:
        return f"at the peak the calls would take {found.offered_max:.0%} of {most_replicas} replicas"
    if lost <= DEGRADED:
        return None
    said = f"{lost:.1%} of the answers are degraded"
    if found.offered_max > _FULL:
        return f"{said}, for the calls would take {found.offered_max:.0%} of all {most_replicas} replicas"
    return (
        f"{said} though the calls would take only {found.offered_max:.0%} of {most_replicas} replicas: more come too "
        "late (a lower target_ongoing_requests or upscale_delay_s, or more min_replicas, would help, too)"
    )


@dataclass(frozen=True)
class Bottleneck:
    """Where a fleet stops fitting its cloud."""

    devices: int
    """The most that fit, within 2%; 0 if none do."""
    reason: str
    """What happens with more."""


def bottleneck(simulator: Simulator, most: int) -> Bottleneck | None:
    """Where it stops fitting, at up to so many devices; None if all of them fit."""
    fleet = simulator.fleet
    limit = fleet.scaling.max_replicas

    def reason_at(devices: int) -> str | None:
        return why_not(simulator.at(devices), limit)

    reason = reason_at(most)
    if reason is None:
        return None
    per_device = curve(fleet, simulator.seed).peak * simulator.work.cloud_share * fleet.cloud.service(1)
    high = most
    low = min(most - 1, int(0.9 * limit / per_device)) if per_device else most // 2
    while low >= 1 and (found := reason_at(low)):
        high, reason, low = low, found, low // 2
    while low >= 1 and high > max(low + 1, low * _CLOSE):
        middle = round((low * high) ** 0.5)
        middle = min(max(middle, low + 1), high - 1)
        found = reason_at(middle)
        low, high, reason = (low, middle, found) if found else (middle, high, reason)
    return Bottleneck(max(low, 0), reason)


@dataclass(frozen=True)
class Advice:
    """A policy under which the fleet fits its cloud."""

    policy: Policy
    """It differs in its gate's threshold alone where the gate has one."""
    before: dict[str, float]
    """accuracy, joules and cloud_share of the policy as it is, by replay."""
    after: dict[str, float]
    """The same of this one."""
    outcome: Outcome
    """The fleet simulated under it."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "policy": self.policy.to_dict(),
            "before": self.before,
            "after": self.after,
            "outcome": self.outcome.to_dict(),
        }


@dataclass(frozen=True)
class Adviser:
    """Looks for the threshold that makes a fleet fit."""

    table: ExitsTable
    """What thresholds are chosen from: its validation split."""
    policy: Policy
    """As it is."""
    split: str
    """On which is simulated and reported."""
    seed: int
    price: Price
    mode: Mode

    def advise(self, fleet: Fleet) -> Advice | None:
        """The most accurate threshold, on validation, of those whose calls the cloud can take; None if none helps."""
        points = self._points()
        fits: dict[float, Outcome | None] = {}

        def at(share: float) -> Policy:
            rows = np.flatnonzero(points.cloud_share <= share + 1e-12)
            best = rows[np.lexsort((points.cloud_share[rows], points.joules[rows], -points.accuracy[rows]))[0]]
            chosen = policy_of(points, int(best), self.table.hard_classes)
            return replace(chosen, temperatures=self.policy.temperatures)

        def fitting(share: float) -> bool:
            exits, costs = self.table.exits(self.split), self.table.costs
            work = workload(exits, costs, at(share))
            found = Simulator(fleet, work, self.seed, self.price, self.mode).at(fleet.devices)
            fits[share] = found if why_not(found, fleet.scaling.max_replicas) is None else None
            return fits[share] is not None

        share = _largest(fitting, float(points.cloud_share.min()), self._share("validation"))
        if share is None:
            return None
        found = fits[share]
        assert found is not None, "it fits"
        return Advice(at(share), self._figures(self.policy), self._figures(at(share)), found)

    def _points(self) -> Points:
        """Every threshold of the policy's gate; of all single ones, for a gate with several."""
        recorded = Recorded(self.table.exits("validation"), self.table.costs, self.policy.temperatures)
        gates: tuple[Measure, ...] = tuple(measure for measure in MEASURES if measure == self.policy.gate) or MEASURES
        size = len(self.policy.hard_classes)
        return Points.join([every_point(recorded, gate, size) for gate in gates])

    def _share(self, split: str) -> float:
        return replay(self.table.exits(split), self.table.costs, self.policy).share["cloud"]

    def _figures(self, policy: Policy) -> dict[str, float]:
        found = replay(self.table.exits(self.split), self.table.costs, policy)
        return {"accuracy": found.accuracy, "joules": found.total_joules, "cloud_share": found.share["cloud"]}


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float | None:
    """The largest share that fits, by halving; None if the lowest does not."""
    if not fits(low):
        return None
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def devices_of(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of devices to simulate, ascending.

    Raises:
        UserError: none; one that is not 1 or more.
    """
    wrong = [number for number in numbers if number < 1]
    if wrong or not numbers:
        raise UserError(f"devices {list(numbers)}: give one number or more, each 1 or more")
    return tuple(sorted(set(numbers)))
