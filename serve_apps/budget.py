"""Holds the share of requests that go to the cloud at a target while the input drifts, by moving the threshold.

The threshold is a quantile of the latest complexities; what was sent too much or too little is paid back over the next
window, so that the share over any longer stretch stays at the target whatever the input does.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from meanet.errors import UserError
from meanet.routing import Floats


@dataclass(frozen=True)
class Budget:
    """What is to be held, and within which bounds."""

    cloud_share: float | None = None
    """Of the requests that may go to the cloud, 0..1."""
    joules: float | None = None
    """Of the device an image, instead."""
    lowest: float = 0.0
    """The threshold never falls below this."""
    highest: float = float("inf")
    """Nor rises above this."""
    window: int = 200
    """Requests whose complexities are looked at, and over which an excess is paid back."""

    def __post_init__(self) -> None:
        if (self.cloud_share is None) == (self.joules is None):
            raise UserError("a budget holds cloud_share or joules: give one of them")
        share = self.cloud_share
        if share is not None and not 0 < share < 1:
            raise UserError(f"budget cloud_share is {share}: it must lie between 0 and 1, both excluded")
        if self.joules is not None and not self.joules > 0:
            raise UserError(f"budget joules is {self.joules}: it must be above 0")
        if not self.lowest < self.highest:
            raise UserError(f"budget bounds {self.lowest}..{self.highest}: give lowest < highest")
        if self.window < 20:
            raise UserError(f"budget window is {self.window}: it must be 20 or more requests")


class BudgetKeeper:
    """Moves one replica's threshold."""

    def __init__(self, budget: Budget, threshold: float) -> None:
        """Starts from the operating point's `threshold`."""
        self.budget = budget
        self.threshold = float(np.clip(threshold, budget.lowest, budget.highest))
        self._seen: deque[float] = deque(maxlen=budget.window)
        self._excess = 0.0
        self._joules: deque[tuple[float, float]] = deque(maxlen=budget.window)

    @property
    def bounded(self) -> bool:
        """Whether the threshold stands at a bound, so that the target may not be held."""
        return self.threshold in (self.budget.lowest, self.budget.highest)

    def record(self, complexity: Floats, edge_joules: Floats, upload_joules: Floats) -> float:
        """What a micro-batch was like, under the threshold in force; returns the next one.

        Args:
            complexity: (N,) of the samples that may go to the cloud; infinite ones go whatever the threshold.
            edge_joules: (N,) what the device's compute took.
            upload_joules: (N,) what an upload takes, whether it was made or not.
        """
        if not len(complexity):
            return self.threshold
        self._joules.extend(zip(edge_joules.tolist(), upload_joules.tolist(), strict=True))
        target = self._target()
        self._excess += float((complexity > self.threshold).sum()) - target * len(complexity)
        limit = float(self.budget.window)
        self._excess = float(np.clip(self._excess, -limit, limit))  # an outage of hours is not paid back for hours
        self._seen.extend(complexity.tolist())
        if len(self._seen) >= min(20, self.budget.window):
            wanted = np.clip(target - self._excess / self.budget.window, 0.0, 1.0)
            ordered = np.sort(np.fromiter(self._seen, dtype=np.float64))
            place = int(np.clip(round((1 - wanted) * len(ordered)) - 1, -1, len(ordered) - 1))
            found = ordered[place] if place >= 0 else -np.inf
            self.threshold = float(np.clip(found, self.budget.lowest, self.budget.highest))
        return self.threshold

    def _target(self) -> float:
        """The share to hold; of joules, what is left of them beside the device's compute."""
        if self.budget.cloud_share is not None:
            return self.budget.cloud_share
        edge, upload = np.array(self._joules).mean(axis=0)
        assert self.budget.joules is not None, "a budget holds one of the two"
        return float(np.clip((self.budget.joules - edge) / max(upload, 1e-30), 0.0, 1.0))
