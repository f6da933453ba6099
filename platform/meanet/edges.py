"""What the edge makes of recorded exits at every split size.

The softmax over the extension's first k classes grows by a column from one size to the next.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use. Pure arrays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meanet.energy import CostModel
from meanet.replay import Exits
from meanet.routing import Bools, Floats, Ints, Policy, Reading, read_extension, read_main

UNSCALED = {"main": 1.0, "extension": 1.0}
"""Temperatures of logits as they are."""


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
