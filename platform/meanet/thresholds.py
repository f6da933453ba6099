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
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.replay import Exits
from meanet.routing import GATES, MEASURES, Bools, Floats, Ints, Policy, Reading, complexity, read_extension, read_main

ROUNDING = 1e-12
"""Complexities this close are taken as equal: elsewhere they may come out in another order."""
UNSCALED = {"main": 1.0, "extension": 1.0}
"""Temperatures of logits as they are."""


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


class Recorded:
    """Exits read at one pair of temperatures, with what each sample costs."""

    def __init__(self, exits: Exits, costs: CostModel, temperatures: dict[str, float] | None = None) -> None:
        self.exits, self.costs = exits, costs
        self.temperatures = temperatures or UNSCALED
        self.scaled = self.temperatures != UNSCALED
        self.main: Reading = read_main(exits.main_logits, Policy(temperatures=self.temperatures))
        place = np.full(exits.num_classes, len(exits.hard_classes), dtype=np.int32)
        place[list(exits.hard_classes)] = np.arange(len(exits.hard_classes))
        self.rank: NDArray[np.int32] = place[self.main.pred]
        """(N,) place of main's answer among the hard classes; H if it is none."""
        self.main_right: Bools = self.main.pred == exits.labels
        self.cloud_right: Bools = exits.cloud_pred == exits.labels
        self.upload_joules, self.cloud_seconds = (
            np.broadcast_to(values, exits.labels.shape)
            for values in (costs.upload_joules(exits.upload_bytes), costs.cloud_seconds(exits.upload_bytes))
        )

    @property
    def cheaper_on_edge(self) -> bool:
        """Whether a sample that stays on the edge never costs more than one that leaves, in joules and in seconds."""
        return bool(
            self.costs.extension_joules <= self.upload_joules.min()
            and self.costs.extension_seconds <= self.cloud_seconds.min()
        )


@dataclass(frozen=True)
class Edge:
    """What the edge makes of N samples with the k hardest classes in use."""

    size: int
    """k."""
    hard: Bools
    """(N,) main predicts one of the k."""
    right: Bools
    """(N,) the answer that the edge accepts is right."""
    entropy: Floats | None
    """(N,) of that answer, where it was asked for; infinite where the main exit's logits are not finite."""


def edges(recorded: Recorded, sizes: Iterable[int], order: Ints, *, entropy: bool = False) -> Iterator[Edge]:
    """The edge at each split size, samples in the given order; arrays are used again for the next size.

    The softmax over the first k extension logits follows from that over the first k - 1. Rows on which rounding could
    turn a comparison (two confidences of nearly 1, logits hundreds apart or not finite) go through the exit rule's own
    reading.
    """
    wanted, exits = set(sizes), recorded.exits
    main_right, rank = recorded.main_right[order], recorded.rank[order]
    labels = exits.labels[order].astype(np.int32)
    main_confidence, main_entropy = recorded.main.confidence[order], recorded.main.entropy[order]
    if 0 in wanted:
        yield Edge(0, np.zeros(len(order), dtype=bool), main_right.copy(), main_entropy if entropy else None)
    last = max(wanted)
    if not last:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        logits = exits.extension_logits[order, :last].T.astype(np.float64, order="C")
        if recorded.temperatures["extension"] != 1.0:
            logits /= recorded.temperatures["extension"]
        highest = logits.max(axis=0)
        plain = (main_confidence < 1 - 1e-9) & (highest - logits.min(axis=0) < 600) & np.isfinite(main_entropy)
        logits -= highest
    careful = np.flatnonzero(~plain)
    logits[:, careful] = 0.0
    careful_logits = exits.extension_logits[order[careful]]
    weighted = np.zeros(len(order)) if entropy else None
    running = _Running(len(order))
    for column in range(last):
        scores = logits[column]
        exponent = np.exp(scores)
        if weighted is not None:
            weighted += exponent * scores
        running.add(exponent, labels == exits.hard_classes[column])
        size = column + 1
        if size not in wanted:
            continue
        right, confidence = running.right, running.best / running.total
        own_entropy = None if weighted is None else np.log(running.total) - weighted / running.total
        if len(careful):
            policy = Policy(hard_classes=exits.hard_classes[:size], temperatures=recorded.temperatures)
            reading = read_extension(careful_logits, policy)
            right = right.copy()
            right[careful], confidence[careful] = reading.pred == labels[careful], reading.confidence
            if own_entropy is not None:
                own_entropy[careful] = reading.entropy
        hard = rank < size
        extends = hard & ~(main_confidence > confidence)
        if own_entropy is not None:
            own_entropy = np.where(extends & np.isfinite(main_entropy), np.maximum(own_entropy, 0.0), main_entropy)
        yield Edge(size, hard, np.where(extends, right, main_right), own_entropy)


class _Running:
    """Sum and maximum of exponentials, and whether the class of the maximum is right, a class at a time."""

    def __init__(self, count: int) -> None:
        self.total, self.best = np.zeros(count), np.full(count, -1.0)
        self.right = np.zeros(count, dtype=bool)

    def add(self, exponent: Floats, is_label: Bools) -> None:
        self.total += exponent
        better = exponent > self.best
        np.copyto(self.right, is_label, where=better)
        np.maximum(self.best, exponent, out=self.best)


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

    def points(self) -> Points:
        counts = [len(row[0]) for row in self._rows]
        prefixes, *sums = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        sizes = np.repeat(self._sizes, counts)
        if all(score is self._scores[0] for score in self._scores):
            threshold = midway(self._scores[0], prefixes)
        else:
            threshold = np.concatenate(
                [midway(score, row[0]) for score, row in zip(self._scores, self._rows, strict=True)]
            )
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
    return np.where(kept == len(score), np.inf, middle)


def every_point(recorded: Recorded, measure: Measure, size: int) -> Points:
    """Every distinct threshold of one gate with the `size` hardest classes in use: P <= N + 1 points."""
    collector = _Collector(recorded, measure)
    for found, sums in GateSums(recorded, measure, [size]):
        collector.add(found, sums, sums.kept)
    return collector.points()


def sweep_gate(recorded: Recorded, measure: Measure, sizes: Iterable[int], z: float = 0.0) -> tuple[int, Points]:
    """Compare every distinct threshold at every split size; keep each size's points that could be chosen.

    Kept are, at each size, the points that no other of that size beats in accuracy and costs (joules, seconds and cloud
    share fall together as more samples stay), and those that none beats in costs and the upper bound of their loss.
    Where an upload is cheaper than the extension block that does not hold, and all points are kept.

    Args:
        recorded: exits and costs.
        measure: the gate.
        sizes: numbers of hard classes in use.
        z: standard errors that the bound of the loss lies above its estimate.

    Returns:
        How many points were compared, and those that are left.
    """
    collector, compared = _Collector(recorded, measure), 0
    falling = measure == "accepted_entropy" or recorded.cheaper_on_edge
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
    return compared, collector.points()


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
