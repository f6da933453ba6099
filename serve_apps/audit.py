"""Asks the cloud about a share of the answers that the edge was sure of: where they part more often than on validation,
the input has drifted away from what the thresholds were chosen on.

The answer has gone out long before; an audit costs an upload and changes nothing but what is known.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from meanet.errors import UserError


@dataclass(frozen=True)
class AuditConfig:
    """How much is asked, and when it is drift."""

    share: float = 0.0
    """Of the answers that stay on the edge, 0..1; 0 = none."""
    expected: float = 0.0
    """Share of such answers with which the cloud disagrees on validation, 0..1."""
    window: int = 300
    """Audits that are looked at."""
    significance: float = 1e-4
    """Chance of as many disagreements without drift, below which it is drift; looked at after every audit."""

    def __post_init__(self) -> None:
        for name in ("share", "expected"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"audit {name} is {value}: it is a share, 0..1")
        if self.window < 20:
            raise UserError(f"audit window is {self.window}: it must be 20 or more")
        if not 0 < self.significance < 1:
            raise UserError(f"audit significance is {self.significance}: it must lie between 0 and 1")


class Audit:
    """Of one replica."""

    def __init__(self, config: AuditConfig, seed: int | None = None) -> None:
        self.config = config
        self._generator = np.random.default_rng(seed)
        self._disagreed: deque[bool] = deque(maxlen=config.window)

    def draw(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """(count,) which of so many answers to ask about."""
        return self._generator.random(count) < self.config.share

    def record(self, *, disagreed: bool) -> None:
        """The cloud has spoken."""
        self._disagreed.append(disagreed)

    @property
    def count(self) -> int:
        """Audits in the window."""
        return len(self._disagreed)

    @property
    def disagreement(self) -> float | None:
        """Share of the window on which edge and cloud part; None before any audit."""
        return float(np.mean(self._disagreed)) if self._disagreed else None

    @property
    def drifted(self) -> bool:
        """Whether so many disagreements are no chance (binomial test against what is expected)."""
        if self.count < 20:
            return False
        chance = float(binom.sf(sum(self._disagreed) - 1, self.count, max(self.config.expected, 1e-3)))
        return chance < self.config.significance
