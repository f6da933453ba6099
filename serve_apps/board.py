"""What all edge replicas have done and do: each hands its counts to one board, and any of them can ask it.

A scrape behind one ingress reaches one replica only; without a board it would see another one's counts each time.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_apps.tally import Counts

WINDOW_S = 60.0
"""What `the last minute` is."""
_STEP_S = 1.0
_SILENT_S = 5.0
"""After so long without a report a replica no longer counts as present."""
_GONE_S = 600.0
"""After so long it is never heard of again, by Serve's health checks; its counts stay."""


@dataclass(frozen=True)
class ReplicaState:
    """How a replica stands now."""

    breaker: str
    """closed, open or half_open."""
    version: int
    """Of the model that it answers with."""
    policy: dict[str, Any]
    """In force: id, gate, thresholds."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Further figures by name, such as the audit's counts; of several replicas their sum is shown."""


def summed_gauges(states: Sequence[ReplicaState]) -> dict[str, float]:
    """By name, in the names' order."""
    found: Counter[str] = Counter()
    for state in states:
        found.update(state.gauges)  # adds
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Report:
    """What a replica hands in, again and again."""

    replica: str
    """Its id: another one after a restart."""
    counts: Counts
    """Since its start."""
    state: ReplicaState


@dataclass(frozen=True)
class Step:
    """A step of the last minute."""

    ago_s: float
    """When it ended, before now."""
    seconds: float
    """How long it was."""
    counts: Counts
    """What was counted within."""


@dataclass(frozen=True)
class View:
    """Of all replicas together."""

    totals: Counts
    """Since the board's start; never less than before, whichever replicas have gone."""
    states: dict[str, ReplicaState]
    """Of the replicas that are present."""
    steps: list[Step]
    """The last minute, oldest first."""

    @property
    def window(self) -> Counts:
        """Of the last minute."""
        total = Counts()
        for step in self.steps:
            total = total.plus(step.counts)
        return total


class Board:
    """Collects reports; its own clock is what `the last minute` goes by."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Report]] = {}
        self._base, self._heard = Counts(), Counts()
        self._history: deque[tuple[float, Counts]] = deque([(clock(), Counts())])

    def report(self, report: Report) -> None:
        """Take a replica's counts in place of its former ones; late ones of the same replica change nothing."""
        now = self._clock()
        before = self._reports.get(report.replica)
        if before is None or report.counts.passed >= before[1].counts.passed:
            self._reports[report.replica] = now, report
            if before is not None:  # of the last minute is only what was seen to come
                self._heard = self._heard.plus(report.counts.plus(before[1].counts, -1))
        for replica, (seen, last) in list(self._reports.items()):
            if now - seen > _GONE_S:
                self._base = self._base.plus(last.counts)
                del self._reports[replica]
        if now - self._history[-1][0] >= _STEP_S:
            self._history.append((now, self._heard))
        while len(self._history) > 2 and now - self._history[1][0] >= WINDOW_S:
            self._history.popleft()

    def view(self) -> View:
        """All replicas together, now."""
        now = self._clock()
        points = [point for point in self._history if now - point[0] <= WINDOW_S + _STEP_S]
        if points and now - points[-1][0] >= _STEP_S / 2:
            points.append((now, self._heard))
        steps = [
            Step(now - end, end - start, after.plus(before, -1))
            for (start, before), (end, after) in itertools.pairwise(points)
        ]
        present = {name: report.state for name, (seen, report) in self._reports.items() if now - seen <= _SILENT_S}
        return View(self._totals(), present, steps)

    def _totals(self) -> Counts:
        total = self._base
        for _, report in self._reports.values():
            total = total.plus(report.counts)
        return total
