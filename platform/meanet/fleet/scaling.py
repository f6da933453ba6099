"""How many replicas the cloud has: the rule of Ray Serve's default autoscaling policy (2.60), apart from Ray. Pure."""

import math
from collections import deque

from meanet.fleet.model import Autoscaling, Fleet
from meanet.fleet.queueing import Load, waiting


class Autoscaler:
    """Decides at each interval, from the ongoing calls, how many replicas there are to be."""

    def __init__(self, rule: Autoscaling, replicas: int) -> None:
        """`replicas` to begin with."""
        self._rule = rule
        self.target = replicas
        self._seen: deque[tuple[float, float]] = deque()
        self._direction, self._since = 0, 0.0

    def decide(self, now: float, ongoing: float) -> int:
        """Replicas that are wanted.

        Args:
            now: s; later than at the call before.
            ongoing: calls that waited or ran, on average since the call before.
        """
        rule = self._rule
        self._seen.append((now, ongoing))
        while self._seen[0][0] <= now - rule.look_back_period_s:
            self._seen.popleft()
        mean = sum(value for _, value in self._seen) / len(self._seen)
        wanted = math.ceil(mean / rule.target_ongoing_requests - 1e-9)
        wanted = min(max(wanted, rule.min_replicas), rule.max_replicas)
        direction = (wanted > self.target) - (wanted < self.target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delay = rule.upscale_delay_s if direction > 0 else rule.downscale_delay_s
        if direction and now - self._since >= delay - 1e-6:
            self.target, self._direction = wanted, 0
        return self.target


class Replicas:
    """How many replicas answer: those that are wanted, new ones after their start."""

    def __init__(self, rule: Autoscaling, replicas: int) -> None:
        """`replicas` to begin with."""
        self._startup_s = rule.startup_s
        self.ready = replicas
        self._starting: deque[float] = deque()

    def want(self, now: float, target: int) -> None:
        """Start or stop; those that start are stopped first."""
        have = self.ready + len(self._starting)
        self._starting.extend([now + self._startup_s] * (target - have))
        while self._starting and self.ready + len(self._starting) > target:
            self._starting.pop()
        self.ready = min(self.ready, target)
        self.pass_time(now)

    def pass_time(self, now: float) -> None:
        """Those whose start is over answer."""
        while self._starting and self._starting[0] <= now:
            self._starting.popleft()
            self.ready += 1

    @property
    def paid(self) -> int:
        """Those that cost: ready or starting."""
        return self.ready + len(self._starting)


def first_replicas(fleet: Fleet, images_per_second: float, cloud_share: float) -> int:
    """Those that the cloud begins with: the fewest that the rule leaves as they are under the first load."""
    rule = fleet.scaling
    if not fleet.warm:
        return rule.min_replicas
    calls, service = images_per_second * cloud_share, fleet.cloud.service(1)

    def enough(replicas: int) -> bool:
        law = waiting(Load(calls, service, 0.0, replicas, fleet.limits.cloud_budget_s))
        return law.ongoing <= rule.target_ongoing_requests * replicas

    low, high = rule.min_replicas, rule.max_replicas
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
