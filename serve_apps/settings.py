"""What a server may be told: limits, deadlines, breaker. Plain values, checked."""

from dataclasses import dataclass

from meanet.errors import UserError


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

    def __post_init__(self) -> None:
        for name in ("deadline_s", "cloud_budget_s", "breaker_open_s"):
            value = getattr(self, name)
            _require(0 < value < 3600, f"{name} is {value}: it must be above 0 and below 3600 seconds")
        reserve = self.reserve_s
        _require(0 <= reserve < self.deadline_s, f"reserve_s is {reserve}: it must be 0 or more and below deadline_s")
        for name in ("max_queued", "max_cloud_calls", "breaker_failures"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}: it must be 1 or more")
