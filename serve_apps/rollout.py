"""How a version takes another's place without a failed request: decisions alone, no Ray and no network.

load: every live replica, edge and cloud, loads the new version beside the old. switch: the edges answer with it, while
the old one stays loaded for what was admitted before. idle: all do; a while later the old one is dropped.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Place = Literal["edge", "cloud"]
Phase = Literal["load", "switch", "idle"]


@dataclass(frozen=True)
class Beat:
    """What a replica says of itself, every second or sooner."""

    replica: str
    place: Place
    node: str
    """Ray's id of the node that it runs on."""
    revision: int = -1
    """Of the desired state, as far as this replica has it; -1 = none yet."""
    held: tuple[int, ...] = ()
    """The versions that it has loaded."""
    told: tuple[int, ...] = ()
    """Those that it knows it is to hold."""
    serving: int | None = None
    """The version that an edge replica answers with."""
    failed: dict[int, str] = field(default_factory=dict)
    """Versions that it could not load, and why."""
    report: dict[str, Any] = field(default_factory=dict)
    """Counts and states, handed on to who asks for them."""

    @property
    def busy(self) -> bool:
        """Whether it still loads something."""
        return bool(set(self.told) - set(self.held) - set(self.failed))


class Plan:
    """Which version is served and which are to be held, given what the replicas say."""

    def __init__(
        self,
        version: int,
        *,
        forget_s: float = 5.0,
        linger_s: float = 5.0,
        load_s: float = 300.0,
        grace_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with one version served.

        Args:
            version: that is served.
            forget_s: a replica that was silent for so long is gone.
            linger_s: how long a version stays loaded after the last edge answered with it.
            load_s: a version that some replica has not loaded by then is refused.
            grace_s: nothing moves before the replicas had that long to report.
            clock: monotonic, s.
        """
        self.serving = version
        self.target: int | None = None
        self.refused: dict[int, str] = {}
        self._forget_s, self.linger_s, self._load_s = forget_s, linger_s, load_s
        self._clock = clock
        self._ready = clock() + grace_s
        self._members: dict[str, tuple[Beat, float]] = {}
        self._started = 0.0
        self._lingering: dict[int, float] = {}

    @property
    def members(self) -> list[Beat]:
        """The last word of every replica that lives."""
        now = self._clock()
        self._members = {name: one for name, one in self._members.items() if now - one[1] < self._forget_s}
        return [beat for beat, _ in self._members.values()]

    @property
    def phase(self) -> Phase:
        """Where the rollout stands."""
        if self.target is not None:
            return "load"
        serving = {beat.serving for beat in self.members if beat.place == "edge"}
        return "switch" if serving - {self.serving, None} else "idle"  # an edge that just starts will serve it

    @property
    def hold(self) -> tuple[int, ...]:
        """The versions that every replica is to have loaded."""
        return tuple(sorted({self.serving, *self._lingering} | ({self.target} if self.target is not None else set())))

    def start(self, version: int) -> None:
        """Roll a version out; one under way is given up for it."""
        self.refused.pop(version, None)
        if version == self.serving:
            self.target = None
        elif version != self.target:
            self.target, self._started = version, self._clock()

    def hear(self, beat: Beat) -> None:
        """A replica has reported."""
        self._members[beat.replica] = (beat, self._clock())

    def forget(self, replica: str) -> None:
        """A replica says that it goes."""
        self._members.pop(replica, None)

    def step(self) -> bool:
        """Move on as far as the replicas' reports allow; whether the served version is another one now."""
        now, members = self._clock(), self.members
        in_use = {beat.serving for beat in members}
        for version in list(self._lingering):
            if version in in_use:
                self._lingering[version] = now
            elif now - self._lingering[version] >= self.linger_s:
                del self._lingering[version]
        if self.target is None or now < self._ready:
            return False
        failures = [
            f"{beat.place} replica: {beat.failed[self.target]}" for beat in members if self.target in beat.failed
        ]
        missing = [beat.replica for beat in members if self.target not in beat.held]
        if not failures and missing and now - self._started >= self._load_s:
            failures = [f"{len(missing)} replica(s) had not loaded it after {self._load_s:.0f} s"]
        if failures:
            self.refused[self.target], self.target = failures[0], None
            return False
        if missing or not any(beat.place == "edge" for beat in members):
            return False
        self._lingering[self.serving] = now
        self.serving, self.target = self.target, None
        self._lingering.pop(self.serving, None)
        return True
