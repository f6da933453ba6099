"""What a server may be told while it runs: limits, deadlines, breaker, budget, audit. Plain values, checked."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from meanet.errors import UserError
from serve_apps.audit import AuditConfig
from serve_apps.budget import Budget


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Settings:
    """Of the edge. Seconds, unless said otherwise."""

    deadline_s: float = 2.0
    """A request is answered within this, or refused with 503 at once; a client may ask for less."""
    cloud_budget_s: float = 0.5
    """Of a request's deadline, what the cloud may take; then the edge's best answer goes out."""
    reserve_s: float = 0.05
    """Of a request's deadline, what is kept for the edge's own answer should the cloud not come."""
    max_queued: int = 512
    """Images that may wait for the edge's blocks; more are refused with 503."""
    max_cloud_calls: int = 8
    """Calls to the cloud under way at a time; where there are more, the edge answers."""
    breaker_failures: int = 3
    """Failed calls in a row that open the breaker."""
    breaker_open_s: float = 1.0
    """How long it stays open before a probe is sent."""
    lowest_threshold: float | None = None
    """Requests and operators may set no threshold below it, nor a budget move it there; None = any finite number."""
    highest_threshold: float | None = None
    """Nor above it."""
    budget: Budget | None = None
    """What the cloud may take, held by moving the threshold; None = the threshold stays."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    """Which answers are compared with the cloud's afterwards."""
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def __post_init__(self) -> None:
        for name in ("deadline_s", "cloud_budget_s", "breaker_open_s"):
            value = getattr(self, name)
            _require(0 < value < 3600, f"{name} is {value}: it must be above 0 and below 3600 seconds")
        reserve = self.reserve_s
        _require(0 <= reserve < self.deadline_s, f"reserve_s is {reserve}: it must be 0 or more and below deadline_s")
        for name in ("max_queued", "max_cloud_calls", "breaker_failures"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}: it must be 1 or more")
        low, high = self.bounds
        _require(low <= high, f"thresholds from {low} to {high}: lowest_threshold must not be above highest_threshold")
        _ = self.held  # whose bounds must leave something

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the thresholds that may be set; infinite where there is none."""
        low, high = self.lowest_threshold, self.highest_threshold
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def held(self) -> Budget | None:
        """The budget, within the bounds of thresholds as within its own.

        Raises:
            UserError: nothing is left between them.
        """
        if self.budget is None:
            return None
        low, high = self.bounds
        high = min(high, math.inf if self.budget.highest is None else self.budget.highest)
        return replace(self.budget, lowest=max(self.budget.lowest, low), highest=high if math.isfinite(high) else None)

    def check_thresholds(self, thresholds: Iterable[float | None]) -> None:
        """Check thresholds that somebody wishes; None, never to the cloud, is always allowed.

        Raises:
            UserError: one is out of bounds.
        """
        low, high = self.bounds
        for threshold in thresholds:
            if threshold is not None and not low <= threshold <= high:
                raise UserError(f"threshold {threshold} is not allowed here: give one from {low} to {high}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `updated` takes them."""
        return asdict(self)

    def updated(self, changes: Mapping[str, Any]) -> "Settings":
        """These settings but for some; those of `audit` may be given in part, too.

        Raises:
            UserError: an unknown name, a value of another type, or one that makes no sense.
        """
        plain = {**self.to_dict(), **changes}
        if isinstance(changes.get("audit"), Mapping):
            plain["audit"] = {**asdict(self.audit), **changes["audit"]}
        try:
            return _reader().validate_json(json.dumps(plain))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "settings"
            raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"settings that are no JSON: {error}") from error


@cache
def _reader() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)
