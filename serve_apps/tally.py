"""What a replica counts of its answers, as plain numbers: cheap an answer, and of many replicas one by adding up."""

from bisect import bisect_left
from dataclasses import dataclass, field, fields
from typing import Any

from serve_apps.http import Answer
from serve_apps.observer import CallOutcome, Observer

SECONDS: tuple[float, ...] = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04)
SECONDS += (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0)
"""Upper bounds of buckets; the entropy of 1,000 classes is 6.9 nats at most."""
KINDS = {
    "cloud circuit open": "circuit open",
    "cloud busy": "busy",
    "cloud timed out": "timed out",
    "cloud failed": "failed",
    "no time for the cloud": "no time",
}
"""Of an answer's reason, by how it begins; what is none of these is `other`, so that labels stay few."""


@dataclass
class Histogram:
    """Values counted by bucket."""

    bounds: tuple[float, ...]
    """Upper, inclusive."""
    counts: list[int] = field(default_factory=list)
    """One more than the bounds: the last one is of what is above them all."""
    total: float = 0.0
    """Sum of the finite values."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The value below which this share lies, interpolated within its bucket; None of no values."""
        wanted, below = share * self.count, 0
        if not self.count:
            return None
        for index, count in enumerate(self.counts):
            if count and below + count >= wanted:
                low = self.bounds[index - 1] if index else 0.0
                high = self.bounds[min(index, len(self.bounds) - 1)]
                return low + (high - low) * (wanted - below) / count if high > low else high
            below += count
        return self.bounds[-1]

    def plus(self, other: "Histogram", sign: int = 1) -> "Histogram":
        """Both, or with a sign of -1 what this one has beyond the other."""
        counts = [mine + sign * theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        return Histogram(self.bounds, counts, self.total + sign * other.total)


def _seconds() -> Histogram:
    return Histogram(SECONDS)


@dataclass
class Counts:
    """Since a replica's start; of several replicas their sum."""

    answers: dict[str, int] = field(default_factory=lambda: {"main": 0, "extension": 0, "cloud": 0})
    """Images, by exit."""
    degraded: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*KINDS.values(), "other"), 0))
    """Images that wanted the cloud and had it not, by kind of reason."""
    refused: dict[str, int] = field(default_factory=lambda: {"overloaded": 0})
    """Requests, by reason."""
    cloud_calls: dict[str, int] = field(default_factory=lambda: {"ok": 0, "timed out": 0, "failed": 0})
    """By outcome."""
    joules: dict[str, float] = field(default_factory=lambda: {"edge_compute": 0.0, "upload": 0.0})
    """Of the device, by part."""
    upload_seconds: dict[str, float] = field(default_factory=lambda: {"measured": 0.0, "modelled": 0.0})
    """The way to the cloud and back, of the calls that it answered, by source."""
    upload_bytes: int = 0
    """Sent to the cloud."""
    passes: int = 0
    """Micro-batches through the edge's blocks."""
    passed: int = 0
    """Their images."""
    entropy: Histogram = field(default_factory=lambda: Histogram(NATS))
    """Of the main exit, nats; logits that are not finite count as infinite, as the exit rule has it."""
    edge: Histogram = field(default_factory=_seconds)
    """Seconds in the edge's blocks, of the answer's micro-batch."""
    cloud: Histogram = field(default_factory=_seconds)
    """Seconds for the cloud, of the answers that waited for it."""
    whole: Histogram = field(default_factory=_seconds)
    """Seconds from a request's arrival to its answer."""

    def plus(self, other: "Counts", sign: int = 1) -> "Counts":
        """Both, or with a sign of -1 what has been counted since the other."""
        return Counts(**{f.name: _plus(getattr(self, f.name), getattr(other, f.name), sign) for f in fields(self)})

    @property
    def images(self) -> int:
        """Answers."""
        return sum(self.answers.values())


def _plus(mine: Any, theirs: Any, sign: int) -> Any:
    """Of two numbers, two histograms or two dicts of numbers."""
    if isinstance(mine, Histogram):
        return mine.plus(theirs, sign)
    if isinstance(mine, dict):
        return {key: mine.get(key, 0) + sign * theirs.get(key, 0) for key in {**mine, **theirs}}
    return mine + sign * theirs


def kind_of(reason: str) -> str:
    """The kind of a degraded answer's reason: one of a few."""
    return next((kind for start, kind in KINDS.items() if reason.startswith(start)), "other")


class Tally(Observer):
    """Counts what a replica does; all on its event loop."""

    def __init__(self) -> None:
        self.counts = Counts()

    def so_far(self) -> Counts:
        """A copy that stays as it is."""
        return self.counts.plus(Counts())

    def answered(self, answer: Answer, bytes_sent: int, seconds: float) -> None:
        """Count an image's answer."""
        counts, joules, ms = self.counts, answer.joules, answer.ms
        counts.answers[answer.exit] += 1
        counts.joules["edge_compute"] += joules.edge_compute
        counts.joules["upload"] += joules.upload
        entropy, place = counts.entropy, -1
        if answer.entropy is not None:
            place = bisect_left(NATS, answer.entropy)
            entropy.total += answer.entropy
        entropy.counts[place] += 1
        _observe(counts.edge, 0.001 * ms.edge)
        _observe(counts.whole, seconds)
        if ms.cloud:
            _observe(counts.cloud, 0.001 * ms.cloud)
        if answer.degraded:
            counts.degraded[kind_of(answer.reason or "")] += 1

    def refused(self, reason: str) -> None:
        """Count a request that was not taken."""
        self.counts.refused[reason] = self.counts.refused.get(reason, 0) + 1

    def passed(self, images: int, seconds: float) -> None:
        """Count a pass of the blocks."""
        self.counts.passes += 1
        self.counts.passed += images

    def uploaded(self, seconds: float, modelled: float) -> None:
        """Add up a call's way to the cloud and back."""
        self.counts.upload_seconds["measured"] += seconds
        self.counts.upload_seconds["modelled"] += modelled

    def cloud_call(self, images: int, bytes_sent: int, seconds: float, outcome: CallOutcome) -> None:
        """Count a call, and the bytes that went up with it."""
        calls = self.counts.cloud_calls
        calls[outcome] = calls.get(outcome, 0) + 1
        self.counts.upload_bytes += bytes_sent


def _observe(histogram: Histogram, seconds: float) -> None:
    histogram.counts[bisect_left(SECONDS, seconds)] += 1
    histogram.total += seconds
