"""The exact search: every distinct threshold x every gate x every split size, over recorded exits.

For one gate and one split size, sort by complexity once; what stays on the edge at a threshold is a prefix, so that
accuracy, joules, seconds and cloud share of all thresholds are prefix sums. From one split size to the next, the
softmax over the extension's first k classes grows by one column. No network runs and nothing is sampled.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use, P points. Pure arrays.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.config import Gate, Measure
from meanet.edges import Recorded, edges
from meanet.errors import UserError
from meanet.replay import Exits
from meanet.routing import GATES, MEASURES, Bools, Floats, Ints, complexity

ROUNDING = 1e-12
"""Complexities this close are taken as equal: elsewhere they may come out in another order."""


@dataclass(frozen=True)
class Points:
    """P operating points, one an element of every array."""

    gate: NDArray[np.int8]
    """(P,) place in `GATES`."""
    measure: NDArray[np.int8]
    """(P,) place in `MEASURES` of what is compared; of samples that main predicts easy, for `two_gate`."""
    measure_hard: NDArray[np.int8]
    """(P,) of samples that main predicts hard."""
    threshold: Floats
    """(P,) infinite = never to the cloud; of samples that main predicts easy, for `two_gate`."""
    threshold_hard: Floats
    """(P,) of samples that main predicts hard; the same for gates of one threshold."""
    scaled: Bools
    """(P,) whether the logits are divided by the temperatures that were fitted on validation."""
    num_hard_classes: Ints
    """(P,) k."""
    accuracy: Floats
    """(P,) 0..1."""
    accuracy_deviation: Floats
    """(P,) its standard error."""
    joules: Floats
    """(P,) of the edge device, J per image."""
    seconds: Floats
    """(P,) expected latency, s per image."""
    cloud_share: Floats
    """(P,) 0..1."""
    loss_vs_cloud: Floats
    """(P,) cloud-only's accuracy minus this one, -1..1."""
    loss_deviation: Floats
    """(P,) standard error of that loss: of the mean of N paired differences."""

    def __len__(self) -> int:
        return len(self.threshold)

    def take(self, index: Ints | Bools) -> "Points":
        """These points only."""
        return Points(**{name: values[index] for name, values in vars(self).items()})

    @staticmethod
    def join(parts: Sequence["Points"]) -> "Points":
        """All points of all parts."""
        return Points(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Sums:
    """Prefix sums over sorted samples: entry i = the first i stay on the edge, the others leave."""

    score: Floats
    """(N,) sorted."""
    lost: Ints
    """(N + 1,) right answers that cloud-only gives beyond these."""
    changed: Ints
    """(N + 1,) samples on the edge that only one of edge and cloud gets right."""
    joules: Floats
    """(N + 1,) sum, J, without the main block's."""
    seconds: Floats
    """(N + 1,) sum, s, without the main block's."""

    @property
    def kept(self) -> Ints:
        """Prefixes that a threshold can cut off: not between scores that are equal but for rounding."""
        with np.errstate(invalid="ignore"):
            inner = np.flatnonzero(self.score[1:] - self.score[:-1] > ROUNDING) + 1
        return np.concatenate(([0], inner, [len(self.score)])).astype(np.int64)


def prefix(values: NDArray[Any], kind: type = np.int32) -> NDArray[Any]:
    """(N + 1,) sums of the first i of (N,)."""
    sums: NDArray[Any] = np.zeros(len(values) + 1, dtype=kind)
    np.cumsum(values, dtype=kind, out=sums[1:])
    return sums


def suffix(values: NDArray[Any]) -> Floats:
    """(N + 1,) sums of all but the first i of (N,)."""
    return prefix(values[::-1], np.float64)[::-1]


class GateSums:
    """The sums of one gate at each split size."""

    def __init__(self, recorded: Recorded, measure: Measure, sizes: Iterable[int]) -> None:
        self._recorded, self._sizes = recorded, list(sizes)
        self._waits = measure == "accepted_entropy"
        if self._waits:
            self._order = np.arange(recorded.exits.num_samples)
        else:
            score = complexity(recorded.main, measure)
            self._order = np.argsort(score)
            self._score = score[self._order]
        self._sorted(self._order)

    def _sorted(self, order: Ints) -> None:
        recorded = self._recorded
        self._cloud_right = recorded.cloud_right[order].view(np.int8)
        self._upload = suffix(recorded.upload_joules[order])
        self._seconds = suffix(recorded.cloud_seconds[order])

    def __iter__(self) -> Iterator[tuple[int, Sums]]:
        costs = self._recorded.costs
        for edge in edges(self._recorded, self._sizes, self._order, entropy=self._waits):
            hard, right = edge.hard, edge.right
            if self._waits:
                assert edge.entropy is not None, "this gate asks for it"
                order = np.argsort(edge.entropy)
                self._sorted(order)
                self._score, hard, right = edge.entropy[order], hard[order], right[order]
            difference = self._cloud_right - right.view(np.int8)
            extended = ran_before(hard, self._score) if self._waits else prefix(hard)
            yield (
                edge.size,
                Sums(
                    self._score,
                    prefix(difference),
                    prefix(difference != 0),
                    self._upload + costs.extension_joules * extended,
                    self._seconds + costs.extension_seconds * extended,
                ),
            )


def ran_before(hard: Bools, score: Floats) -> Ints:
    """(N + 1,) extension blocks that run where the accepted answer's sorted entropy decides.

    Of every sample that main predicts hard, whoever answers in the end; but one of infinite score leaves at once.
    """
    finite = np.isfinite(score)
    waiting: Ints = int((hard & finite).sum()) + prefix(hard & ~finite)
    return waiting


def _staircase(value: NDArray[Any]) -> Ints:
    """Places of a value that is lower than all after it, the last one always."""
    lowest_after = np.minimum.accumulate(value[:0:-1])[::-1]
    return np.append(np.flatnonzero(value[:-1] < lowest_after), len(value) - 1)


def promising(accuracy: Floats, joules: Floats, bins: int = 4096) -> Ints:
    """Places of the points that no point of a cheaper bin matches in accuracy: all of the front, and few others."""
    if len(joules) < bins:
        return np.arange(len(joules))
    lowest, span = joules.min(), np.ptp(joules)
    place = ((joules - lowest) * ((bins - 1) / (span or 1.0))).astype(np.int64)
    best = np.full(bins, -np.inf)
    np.maximum.at(best, place, accuracy)
    before = np.concatenate(([-np.inf], np.maximum.accumulate(best)[:-1]))
    return np.flatnonzero(accuracy > before[place])


class _Collector:
    """Gathers chosen prefixes of many gates and sizes, and makes `Points` of them at the end."""

    def __init__(self, recorded: Recorded, measure: Measure) -> None:
        self._recorded, self._measure = recorded, measure
        self._rows: list[tuple[NDArray[Any], ...]] = []
        self._sizes: list[int] = []
        self._scores: list[Floats] = []

    def add(self, size: int, sums: Sums, prefixes: Ints) -> None:
        values = (sums.lost, sums.changed, sums.joules, sums.seconds)
        self._rows.append((prefixes, *(value[prefixes] for value in values)))
        self._sizes.append(size)
        self._scores.append(sums.score)

    def points(self, *, front_only: bool = False) -> Points:
        counts = [len(row[0]) for row in self._rows]
        prefixes, *sums = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        place = np.repeat(np.arange(len(counts)), counts)
        if front_only:
            rows = promising(-sums[0].astype(np.float64), sums[2])  # numpy's `at` is slow where it must convert
            prefixes, place, sums = prefixes[rows], place[rows], [values[rows] for values in sums]
        sizes = np.array(self._sizes)[place]
        if all(score is self._scores[0] for score in self._scores):
            threshold = midway(self._scores[0], prefixes)
        else:
            threshold = np.empty(len(prefixes))
            for number, score in enumerate(self._scores):
                threshold[place == number] = midway(score, prefixes[place == number])
        by = np.full(len(sizes), MEASURES.index(self._measure), dtype=np.int8)
        return points_of(
            self._recorded,
            self._measure,
            (by, by),
            (threshold, threshold),
            sizes=sizes,
            stays=prefixes,
            sums=sums,
        )


def points_of(
    recorded: Recorded,
    gate: Gate,
    measures: tuple[NDArray[np.int8], NDArray[np.int8]],
    thresholds: tuple[Floats, Floats],
    *,
    sizes: Ints,
    stays: Ints,
    sums: Sequence[NDArray[Any]],
) -> Points:
    """Points from sums over samples.

    Args:
        recorded: what they are sums over.
        gate: of all of them.
        measures: (P,) places in `MEASURES`, of samples that main predicts easy, and hard.
        thresholds: (P,) of either.
        sizes: (P,) k.
        stays: (P,) samples that stay on the edge.
        sums: (P,) each: lost, changed, joules, seconds as `Sums` has them.
    """
    count, costs = recorded.exits.num_samples, recorded.costs
    lost, changed, joules, seconds = sums
    loss = lost / count
    variance = changed / count - loss**2
    accuracy = recorded.cloud_right.mean() - loss
    return Points(
        gate=np.full(len(sizes), GATES.index(gate), dtype=np.int8),
        measure=measures[0],
        measure_hard=measures[1],
        threshold=thresholds[0],
        threshold_hard=thresholds[1],
        scaled=np.full(len(sizes), recorded.scaled),
        num_hard_classes=sizes,
        accuracy=accuracy,
        accuracy_deviation=np.sqrt(np.maximum(accuracy * (1 - accuracy), 0.0) / count),
        joules=costs.main_joules + joules / count,
        seconds=costs.main_seconds + seconds / count,
        cloud_share=1 - stays / count,
        loss_vs_cloud=loss,
        loss_deviation=np.sqrt(np.maximum(variance, 0.0) / count),
    )


def midway(score: Floats, kept: Ints) -> Floats:
    """Thresholds that keep the first `kept` of sorted scores: s[i-1] <= t < s[i].

    Midway between neighbours, so that rounding cannot move a sample; infinite where all are kept.
    """
    last_kept = score[np.maximum(kept - 1, 0)]
    first_gone = score[np.minimum(kept, len(score) - 1)]
    with np.errstate(invalid="ignore"):
        middle = last_kept + (first_gone - last_kept) / 2
    middle = np.where(middle >= first_gone, last_kept, middle)
    middle = np.where(np.isinf(first_gone) & np.isfinite(last_kept), last_kept + 1.0, middle)
    middle = np.where(kept == 0, np.minimum(score[0], 0.0) - 1.0, middle)
    return np.where((kept == len(score)) | np.isinf(last_kept) & (kept > 0), np.inf, middle)


def every_point(recorded: Recorded, measure: Measure, size: int) -> Points:
    """Every distinct threshold of one gate with the `size` hardest classes in use: P <= N + 1 points."""
    collector = _Collector(recorded, measure)
    for found, sums in GateSums(recorded, measure, [size]):
        collector.add(found, sums, sums.kept)
    return collector.points()


def sweep_gate(
    recorded: Recorded, measure: Measure, sizes: Iterable[int], z: float = 0.0, *, front_only: bool = False
) -> tuple[int, Points]:
    """Compare every distinct threshold at every split size; keep each size's points that could be chosen.

    Kept are, at each size, the points that no other of that size beats in accuracy and costs (joules, seconds and cloud
    share fall together as more samples stay), and those that none beats in costs and the upper bound of their loss.
    Where an upload is cheaper than the extension block that does not hold, and all points are kept.

    Args:
        recorded: exits and costs.
        measure: the gate.
        sizes: numbers of hard classes in use.
        z: standard errors that the bound of the loss lies above its estimate.
        front_only: keep no more than what the accuracy-joules front over all sizes can hold.

    Returns:
        How many points were compared, and those that are left.
    """
    collector, compared = _Collector(recorded, measure), 0
    always_paid = measure == "accepted_entropy" and bool(np.isfinite(recorded.main.entropy).all())
    falling = always_paid or recorded.cheaper_on_edge
    count = recorded.exits.num_samples
    cuts: Ints | None = None
    for size, sums in GateSums(recorded, measure, sizes):
        if cuts is None or measure == "accepted_entropy":
            cuts = sums.kept
        compared += len(cuts)
        if not falling:
            collector.add(size, sums, cuts)
            continue
        all_kept = len(cuts) == count + 1
        lost = sums.lost if all_kept else sums.lost[cuts]
        chosen = _staircase(lost)
        if z > 0:
            loss = lost / count
            changed = sums.changed if all_kept else sums.changed[cuts]
            bound = loss + z * np.sqrt(np.maximum(changed / count - loss**2, 0.0) / count)
            chosen = np.union1d(chosen, _staircase(bound))
        collector.add(size, sums, cuts[chosen])
    return compared, collector.points(front_only=front_only)


def check_sizes(exits: Exits, split_sizes: Iterable[int] | None) -> list[int]:
    """Split sizes to search, ascending; all of 0..H if None.

    Raises:
        UserError: a size that the trained extension does not have; no samples.
    """
    trained = len(exits.hard_classes)
    sizes = sorted(set(range(trained + 1) if split_sizes is None else split_sizes))
    if not exits.num_samples:
        raise UserError("the exits table has no samples of that split: evaluate again")
    wrong = [size for size in sizes if not 0 <= size <= trained]
    if wrong or not sizes:
        raise UserError(f"split sizes {wrong or sizes}: choose from 0..{trained}, the trained size")
    return sizes
