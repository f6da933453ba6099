"""What was found under an outage and under overload, and what is required of it; pure, read by `benchmarks.outages`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import load
from benchmarks.load import Sample

DEADLINE_S = 1.0
"""That each request names."""
RECOVERY_S = 5.0
P99_RATIO = 1.5
AT_ONCE_S = 0.25
"""Within which 99 of 100 refusals come."""
GROWTH = 64 * 2**20
"""Bytes between the first and the last quarter of the overload; allocators keep some."""
_SETTLE_S = 1.0
"""After a fault's begin: calls that were under way may still bring an answer."""


@dataclass(frozen=True)
class Question:
    """An image, and what the healthy server says of it."""

    body: bytes
    answer: tuple[int, str]
    """(class id, exit)."""
    edge: int
    """Class id with `edge_only`."""


@dataclass(frozen=True)
class Bound:
    """A figure and what it may be at most."""

    name: str
    value: float
    limit: float

    @property
    def kept(self) -> bool:
        """NaN keeps no bound."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Outage:
    """One fault under load."""

    fault: str
    edge_only: Sequence[Sample]
    samples: Sequence[Sample]
    begin: float
    healthy: float
    """When the cloud's replica was well again; both on the monotonic clock, s."""
    questions: Sequence[Question]

    @property
    def during(self) -> list[Sample]:
        """Due while the cloud was away."""
        return [sample for sample in self.samples if self.begin <= sample.due < self.healthy]

    @property
    def degraded(self) -> int:
        """Answers that are marked."""
        return sum(_answer(sample).get("degraded", False) for sample in self.samples)

    @property
    def recovery_s(self) -> float:
        """From the replica's being well to the first answer of the cloud."""
        came = [one.due + one.seconds for one in self.samples if _answer(one).get("exit") == "cloud"]
        return min((at - self.healthy for at in came if at >= self.healthy), default=float("nan"))

    @property
    def p99_ratio(self) -> float:
        """Of the time while the cloud was away to edge-only's."""
        return load.percentile(self.during, 0.99) / load.percentile(self.edge_only, 0.99)

    def bounds(self) -> list[Bound]:
        """What is required."""
        wrong = [sample for sample in self.samples if not self._right(sample)]
        late = [sample for sample in self.samples if sample.seconds > DEADLINE_S]
        failed = [sample for sample in [*self.edge_only, *self.samples] if sample.reply.status != 200]
        return [
            Bound("failed requests", len(failed), 0),
            Bound("beyond the deadline", len(late), 0),
            Bound("wrong or unmarked answers", len(wrong), 0),
            Bound("p99, ratio to edge-only", self.p99_ratio, P99_RATIO),
            Bound("recovery, s", self.recovery_s, RECOVERY_S),
        ]

    def _right(self, sample: Sample) -> bool:
        """The healthy answer, or where the cloud was wanted and could not be had, the edge's, marked."""
        answer, question = _answer(sample), self.questions[sample.number]
        got = answer.get("class_id"), answer.get("exit")
        if question.answer[1] != "cloud":
            return got == question.answer and not answer["degraded"]
        if got[1] == "cloud":
            away = self.begin + _SETTLE_S < sample.due and sample.due + sample.seconds < self.healthy
            return got == question.answer and not answer["degraded"] and not away
        back = sample.due > self.healthy + RECOVERY_S
        return got[0] == question.edge and bool(answer.get("degraded")) and bool(answer["reason"]) and not back


@dataclass(frozen=True)
class Overload:
    """More load than the server can take."""

    capacity: float
    """Requests a second with as many connections as it takes."""
    samples: Sequence[Sample]
    held: Sequence[int]
    """Bytes of the server's processes, each second."""

    def with_status(self, status: int) -> list[Sample]:
        """Requests that were answered so."""
        return [sample for sample in self.samples if sample.reply.status == status]

    @property
    def growth(self) -> int:
        """Bytes, from the first to the last quarter."""
        quarter = max(1, len(self.held) // 4)
        return max(self.held[-quarter:]) - max(self.held[:quarter])

    def bounds(self) -> list[Bound]:
        """What is required."""
        accepted, refused = self.with_status(200), self.with_status(503)
        silent = [sample for sample in refused if int(sample.reply.headers.get("retry-after", "0")) < 1]
        return [
            Bound("neither answered nor refused", len(self.samples) - len(accepted) - len(refused), 0),
            Bound("answered beyond the deadline", sum(one.seconds > DEADLINE_S for one in accepted), 0),
            Bound("refused without Retry-After", len(silent), 0),
            Bound("p99 of refusals, s", load.percentile(refused, 0.99), AT_ONCE_S),
            Bound("growth, MB", self.growth / 2**20, GROWTH / 2**20),
        ]


def _answer(sample: Sample) -> dict[str, Any]:
    if sample.reply.status != 200:
        return {}
    answer: dict[str, Any] = json.loads(sample.reply.body)
    return answer
