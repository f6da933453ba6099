"""Asks the cloud about a share of the answers that the edge was sure of: where they part more often than on validation,
the input has drifted away from what the thresholds were chosen on.

The answer has gone out long before; an audit costs an upload and changes nothing but what is known.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from meanet.errors import UserError
from meanet.routing import Bools


@dataclass(frozen=True)
class AuditConfig:
    """How much is asked, and when it is drift."""

    share: float = 0.0
    """Of the answers that stay on the edge, 0..1; 0 = none."""
    expected: float | None = None
    """Share of such answers with which the cloud disagrees on validation, 0..1; None = the operating point's."""
    window: int = 300
    """Audits that are looked at."""
    significance: float = 1e-4
    """Chance of as many disagreements without drift, below which it is drift; looked at after every audit."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def __post_init__(self) -> None:
        for name in ("share", "expected"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"audit {name} is {value}: it is a share, 0..1")
        if self.window < 20:
            raise UserError(f"audit window is {self.window}: it must be 20 or more")
        if not 0 < self.significance < 1:
            raise UserError(f"audit significance is {self.significance}: it must lie between 0 and 1")


class Audit:
    """Of one replica."""

    def __init__(self, config: AuditConfig, expected: float | None = None, seed: int | None = None) -> None:
        """Compares with the config's expectation, or with `expected` where it has none."""
        self.config = config
        self.expected = expected if config.expected is None else config.expected
        self._generator = np.random.default_rng(seed)
        self._disagreed: deque[bool] = deque(maxlen=config.window)

    def draw(self, count: int) -> Bools:
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
    def disagreed(self) -> int:
        """How many of them."""
        return sum(self._disagreed)

    @property
    def drifted(self) -> bool | None:
        """Whether so many disagreements are no chance; None where nobody knows what to expect."""
        if self.expected is None:
            return None
        return is_drift(self.disagreed, self.count, self.expected, self.config.significance)


def is_drift(disagreed: int, count: int, expected: float, significance: float) -> bool:
    """Whether so many of `count` audits disagree by chance less often than `significance` (a binomial test)."""
    from scipy.stats import binom

    if count < 20:
        return False
    return float(binom.sf(disagreed - 1, count, max(expected, 1e-3))) < significance
