"""Holds the share of requests that go to the cloud at a target while the input drifts, by moving the threshold.

The threshold is a quantile of the latest complexities; what was sent too much or too little is paid back over the next
window, so that the share over any longer stretch stays at the target whatever the input does.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from meanet.errors import UserError
from meanet.routing import Bools, Floats


@dataclass(frozen=True)
class Budget:
    """What is to be held, and within which bounds."""

    cloud_share: float | None = None
    """Of the requests that may go to the cloud, 0..1."""
    joules: float | None = None
    """Of the device an image, instead."""
    lowest: float = 0.0
    """The threshold never falls below this."""
    highest: float | None = None
    """Nor rises above this; None = it may rise until nothing goes to the cloud."""
    window: int = 200
    """Requests whose complexities are looked at, and over which an excess is paid back."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def __post_init__(self) -> None:
        if (self.cloud_share is None) == (self.joules is None):
            raise UserError("a budget holds cloud_share or joules: give one of them")
        share = self.cloud_share
        if share is not None and not 0 < share < 1:
            raise UserError(f"budget cloud_share is {share}: it must lie between 0 and 1, both excluded")
        if self.joules is not None and not self.joules > 0:
            raise UserError(f"budget joules is {self.joules}: it must be above 0")
        if self.highest is not None and not self.lowest < self.highest:
            raise UserError(f"budget bounds {self.lowest}..{self.highest}: give lowest < highest")
        if self.window < 20:
            raise UserError(f"budget window is {self.window}: it must be 20 or more requests")


class BudgetKeeper:
    """Moves one replica's threshold. Replicas need not know of each other: where each holds the target, all do."""

    def __init__(self, budget: Budget, threshold: float, excess: float = 0.0) -> None:
        """Starts from the operating point's `threshold`, and owes what the keeper before it had sent too much."""
        self.budget = budget
        self._highest = np.inf if budget.highest is None else budget.highest
        self.threshold = float(np.clip(threshold, budget.lowest, self._highest))
        self.excess = excess
        """Requests that went beyond the target so far and are to be paid back."""
        self._seen: deque[float] = deque(maxlen=budget.window)
        self._joules: deque[tuple[float, float]] = deque(maxlen=budget.window)

    @property
    def bounded(self) -> bool:
        """Whether the threshold stands at a bound, so that the target may not be held."""
        return self.threshold in (self.budget.lowest, self._highest)

    def record(self, complexity: Floats, wanted: Bools, edge_joules: Floats, upload_joules: Floats) -> float:
        """What a micro-batch was like; returns the threshold for the next one.

        Args:
            complexity: (N,) of the samples that may go to the cloud; infinite ones go whatever the threshold.
            wanted: (N,) which of them were to go, whether the cloud could be had or not.
            edge_joules: (N,) what the device's compute took.
            upload_joules: (N,) what an upload takes, whether it was made or not.
        """
        if not len(complexity):
            return self.threshold
        self._joules.extend(zip(edge_joules.tolist(), upload_joules.tolist(), strict=True))
        target, window = self._target(), self.budget.window
        excess = self.excess + float(wanted.sum()) - target * len(complexity)
        self.excess = float(np.clip(excess, -window, window))  # an hour at a bound is not paid back for hours
        if not self._seen:
            self.excess /= 2  # of the first, before any drift is known: half is owed, so that no stretch has all of it
        self._seen.extend(complexity.tolist())
        if len(self._seen) >= min(20, window):
            self.threshold = self._quantile(float(np.clip(target - self.excess / window, 0.0, 1.0)))
        return self.threshold

    def _quantile(self, share: float) -> float:
        """The threshold that would have sent this share of the latest samples."""
        ordered = np.sort(np.fromiter(self._seen, dtype=np.float64))
        place = int(np.clip(round((1 - share) * len(ordered)) - 1, -1, len(ordered) - 1))
        found = ordered[place] if place >= 0 else -np.inf
        return float(np.clip(found, self.budget.lowest, self._highest))

    def _target(self) -> float:
        """The share to hold; of joules, what is left of them beside the device's compute."""
        if self.budget.cloud_share is not None:
            return self.budget.cloud_share
        edge, upload = np.array(self._joules).mean(axis=0)
        assert self.budget.joules is not None, "a budget holds one of the two"
        return float(np.clip((self.budget.joules - edge) / max(upload, 1e-30), 0.0, 1.0))
