"""Policies of two gates, by merging fronts of one: a threshold for what main predicts easy, another for what it
predicts hard, each with a complexity measure of its own.

Every sample belongs to one of the two groups, so that what a policy costs and yields is the sum of what it does to
either; no policy that is beaten in its group can be part of one that is not beaten in all.

Shape letters: N samples, k hard classes in use, P points. Pure arrays.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.config import Measure
from meanet.edges import Edge, Recorded, edges
from meanet.routing import MEASURES, Bools, Floats, Ints, complexity
from meanet.thresholds import Points, Sums, midway, points_of, prefix, ran_before, suffix

EARLY: tuple[Measure, ...] = tuple(measure for measure in MEASURES if measure != "accepted_entropy")
"""Known when only the main block ran."""
_BLOCK = 2**21


@dataclass(frozen=True)
class _Part:
    """P thresholds of one group."""

    measure: NDArray[np.int8]
    """(P,) place in `MEASURES`."""
    threshold: Floats
    stays: Ints
    """(P,) samples that stay."""
    lost: Ints
    changed: Ints
    joules: Floats
    seconds: Floats

    def take(self, index: Ints) -> "_Part":
        return _Part(**{name: values[index] for name, values in vars(self).items()})


def sweep_two_gates(recorded: Recorded, sizes: Iterable[int]) -> tuple[int, Points | None]:
    """The accuracy-joules front of two gates at each split size.

    Args:
        recorded: exits and costs.
        sizes: numbers of hard classes in use; 0 has no second group and is left out.

    Returns:
        How many policies the fronts stand for, and the fronts of all sizes; None where there is no size.
    """
    wanted = [size for size in sizes if size]
    if not wanted:
        return 0, None
    early = {measure: complexity(recorded.main, measure) for measure in EARLY}
    covered, found = 0, []
    for edge in edges(recorded, wanted, np.arange(recorded.exits.num_samples), entropy=True):
        assert edge.entropy is not None, "asked for"
        easy_count, easy = _front(recorded, edge, ~edge.hard, early)
        hard_count, hard = _front(recorded, edge, edge.hard, early | {"accepted_entropy": edge.entropy})
        covered += easy_count * hard_count
        found.append(_merge(recorded, edge.size, easy, hard))
    return covered, Points.join(found)


def _front(recorded: Recorded, edge: Edge, group: Bools, scores: dict[Measure, Floats]) -> tuple[int, _Part]:
    """One group's thresholds, of every measure, that no other beats in right answers and joules."""
    rows, costs = np.flatnonzero(group), recorded.costs
    hard = bool(len(rows)) and bool(edge.hard[rows[0]])
    parts = []
    for measure, score in scores.items():
        order = rows[np.argsort(score[rows])] if len(rows) else rows
        difference = recorded.cloud_right[order].view(np.int8) - edge.right[order].view(np.int8)
        ran = np.arange(len(rows) + 1) * hard
        if hard and measure == "accepted_entropy":
            ran = ran_before(edge.hard[order], score[order])
        sums = Sums(
            score[order],
            prefix(difference),
            prefix(difference != 0),
            suffix(recorded.upload_joules[order]) + costs.extension_joules * ran,
            suffix(recorded.cloud_seconds[order]) + costs.extension_seconds * ran,
        )
        kept = sums.kept if len(rows) else np.zeros(1, dtype=np.int64)
        threshold = midway(sums.score, kept) if len(rows) else np.full(1, np.inf)
        columns: list[Any] = [values[kept] for values in (sums.lost, sums.changed, sums.joules, sums.seconds)]
        parts.append(_Part(np.full(len(kept), MEASURES.index(measure), dtype=np.int8), threshold, kept, *columns))
    joined = _Part(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})
    return len(joined.lost), joined.take(unbeaten(joined.lost, joined.joules))


def unbeaten(lost: NDArray[Any], joules: Floats) -> Ints:
    """Places of pairs that no other beats in both, cheapest first."""
    order = np.lexsort((lost, joules))
    sorted_lost = lost[order]
    lowest = np.minimum.accumulate(sorted_lost)
    return order[np.concatenate(([True], sorted_lost[1:] < lowest[:-1]))]


def _merge(recorded: Recorded, size: int, easy: _Part, hard: _Part) -> Points:
    """The front over all pairs, a block of the easy group's thresholds at a time."""
    width = len(hard.lost)
    rows = max(1, _BLOCK // width)
    best = np.zeros(0, dtype=np.int64)
    for start in range(0, len(easy.lost), rows):
        stop = min(start + rows, len(easy.lost))
        pairs = np.concatenate((best, np.arange(start * width, stop * width)))
        first, second = pairs // width, pairs % width
        best = pairs[unbeaten(easy.lost[first] + hard.lost[second], easy.joules[first] + hard.joules[second])]
    first, second = best // width, best % width
    sums = [
        getattr(easy, name)[first] + getattr(hard, name)[second] for name in ("lost", "changed", "joules", "seconds")
    ]
    return points_of(
        recorded,
        "two_gate",
        (easy.measure[first], hard.measure[second]),
        (easy.threshold[first], hard.threshold[second]),
        sizes=np.full(len(best), size),
        stays=easy.stays[first] + hard.stays[second],
        sums=sums,
    )
