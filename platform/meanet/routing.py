"""THE exit rule of MEANet (section V): who answers a sample. Evaluation, search and server all call this file.

A sample with softmax p of the main exit goes
1. to the **cloud** if it is complex: its complexity is above the threshold, and the cloud may be used;
2. else it is answered by the **main** exit if argmax(p) is an easy class;
3. else the **extension** block runs, and its answer stands unless the main exit is more confident.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use. Pure numpy: no torch, no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from meanet.config import Gate
from meanet.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
GATES: tuple[Gate, ...] = get_args(Gate)


class Exit(IntEnum):
    """Where inference ends. `EXTENSION` whenever that block ran, whichever of the two answers was kept."""

    MAIN = 0
    EXTENSION = 1
    CLOUD = 2

    @property
    def label(self) -> str:
        """The name in tables and answers: main, extension or cloud."""
        return self.name.lower()


@dataclass(frozen=True)
class Policy:
    """Everything that the rule depends on beside the logits."""

    gate: Gate = "main_entropy"
    """Which complexity of the main exit is compared with the threshold."""
    thresholds: tuple[float | None, ...] = (None,)
    """One number for these gates; complexity above it is complex. None = never to the cloud."""
    hard_classes: tuple[int, ...] = ()
    """Class ids, hardest first: the extension exit's k classes in use."""
    temperatures: dict[str, float] = field(default_factory=lambda: {"main": 1.0, "extension": 1.0})
    """Logits are divided by these before the softmax."""
    edge_only: bool = False
    """True: nothing may go to the cloud."""

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise UserError(f"unknown gate {self.gate!r}: choose one of {', '.join(GATES)}")
        if len(self.thresholds) != 1:
            raise UserError(f"gate {self.gate} takes one threshold, not {len(self.thresholds)}")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise UserError(f"threshold {self.threshold} is not a finite number: use null for never to the cloud")
        if len(set(self.hard_classes)) != len(self.hard_classes) or any(c < 0 for c in self.hard_classes):
            raise UserError(f"hard_classes {self.hard_classes} must be distinct class ids of 0 or more")
        if sorted(self.temperatures) != ["extension", "main"] or min(self.temperatures.values()) <= 0:
            raise UserError(f"temperatures {self.temperatures} must give main and extension numbers above 0")

    @property
    def threshold(self) -> float | None:
        """The single threshold of these gates."""
        return self.thresholds[0]

    @property
    def uses_cloud(self) -> bool:
        """Whether any sample could go to the cloud."""
        return not self.edge_only and self.threshold is not None

    def with_request(self, *, edge_only: bool = False, threshold: float | None = None) -> "Policy":
        """This policy under a request's own wishes; the stricter `edge_only` wins."""
        thresholds = self.thresholds if threshold is None else (threshold,)
        return replace(self, edge_only=self.edge_only or edge_only, thresholds=thresholds)

    def to_dict(self) -> dict[str, Any]:
        """The fields of an operating point that the rule reads."""
        return {
            "gate": self.gate,
            "thresholds": list(self.thresholds),
            "hard_classes": list(self.hard_classes),
            "temperatures": dict(self.temperatures),
        }

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> "Policy":
        """The policy of an operating point.

        Raises:
            UserError: a field is missing or makes no sense.
        """
        try:
            return Policy(
                gate=plain["gate"],
                thresholds=tuple(None if value is None else float(value) for value in plain["thresholds"]),
                hard_classes=tuple(int(value) for value in plain["hard_classes"]),
                temperatures={name: float(value) for name, value in plain["temperatures"].items()},
            )
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"an operating point cannot be read: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Reading:
    """What one exit says of N samples."""

    pred: Ints
    """(N,) class ids."""
    confidence: Floats
    """(N,) max softmax; 0 where the logits are not finite."""
    entropy: Floats
    """(N,) of the softmax, in nats; infinite where the logits are not finite."""
    margin: Floats
    """(N,) largest minus second largest probability; 0 where the logits are not finite."""

    def take(self, index: Ints) -> "Reading":
        """The readings of these rows."""
        return Reading(self.pred[index], self.confidence[index], self.entropy[index], self.margin[index])


def read(logits: NDArray[np.floating[Any]], temperature: float = 1.0, classes: Sequence[int] | None = None) -> Reading:
    """Softmax, and what the rule needs of it.

    Args:
        logits: (N, C), any float type; computed in float64.
        temperature: divides the logits.
        classes: class id of each column; the column's number if None.
    """
    scaled: Floats = np.asarray(logits, dtype=np.float64) / temperature
    finite: Bools = np.all(np.isfinite(scaled), axis=1)
    safe = np.where(finite[:, None], scaled, 0.0)
    shifted = safe - safe.max(axis=1, keepdims=True)
    exponent = np.exp(shifted)
    total = exponent.sum(axis=1)
    entropy = np.log(total) - (exponent * shifted).sum(axis=1) / total
    column = np.argmax(safe, axis=1)
    confidence = exponent.max(axis=1) / total
    second = np.partition(exponent, -2, axis=1)[:, -2] / total if scaled.shape[1] > 1 else np.zeros(len(scaled))
    return Reading(
        pred=column if classes is None else np.asarray(classes, dtype=np.int64)[column],
        confidence=np.where(finite, confidence, 0.0),
        entropy=np.where(finite, np.maximum(entropy, 0.0), np.inf),
        margin=np.where(finite, confidence - second, 0.0),
    )


def read_main(logits: NDArray[np.floating[Any]], policy: Policy) -> Reading:
    """The main exit's reading, (N, C) logits."""
    return read(logits, policy.temperatures["main"])


def read_extension(logits: NDArray[np.floating[Any]], policy: Policy) -> Reading:
    """The extension exit's reading: (N, H) logits, hardest class first, of which the policy's k are kept."""
    count = len(policy.hard_classes)
    return read(logits[:, :count], policy.temperatures["extension"], policy.hard_classes)


def complexity(main: Reading, gate: Gate) -> Floats:
    """(N,) how complex a sample is: higher = further from certain; infinite where the logits are not finite."""
    if gate == "main_entropy":
        return main.entropy
    certainty = main.confidence if gate == "max_softmax" else main.margin
    return np.where(np.isinf(main.entropy), np.inf, 1.0 - certainty)


def is_complex(main: Reading, policy: Policy) -> Bools:
    """(N,) step 1: which samples go to the cloud."""
    if policy.edge_only or policy.threshold is None:
        return np.zeros(len(main.pred), dtype=bool)
    return complexity(main, policy.gate) > policy.threshold


def is_hard(main: Reading, policy: Policy) -> Bools:
    """(N,) step 2: whether the main exit predicts a hard class."""
    return np.isin(main.pred, np.asarray(policy.hard_classes, dtype=np.int64))


def first_exit(main: Reading, policy: Policy) -> Ints:
    """(N,) steps 1 and 2: the `Exit` at which each sample ends, known before anything but the main block ran."""
    edge = np.where(is_hard(main, policy), Exit.EXTENSION, Exit.MAIN)
    return np.where(is_complex(main, policy), Exit.CLOUD, edge).astype(np.int64)


def settle(main: Reading, extension: Reading) -> Reading:
    """Step 3, over samples whose extension block ran: its answer, unless the main exit is more confident."""
    keep_main = main.confidence > extension.confidence
    return Reading(
        pred=np.where(keep_main, main.pred, extension.pred),
        confidence=np.where(keep_main, main.confidence, extension.confidence),
        entropy=np.where(keep_main, main.entropy, extension.entropy),
        margin=np.where(keep_main, main.margin, extension.margin),
    )


@dataclass(frozen=True)
class Routed:
    """Who answered N samples, and what."""

    exit: Ints
    """(N,) `Exit` values."""
    pred: Ints
    """(N,) class ids."""


def route(
    main_logits: NDArray[np.floating[Any]],
    extension_logits: NDArray[np.floating[Any]],
    cloud_pred: Ints,
    policy: Policy,
) -> Routed:
    """Replay the rule over recorded exits: (N, C) and (N, H) logits and (N,) cloud answers."""
    main = read_main(main_logits, policy)
    exits = first_exit(main, policy)
    pred = main.pred.copy()
    ran = np.flatnonzero(exits == Exit.EXTENSION)
    if len(ran):
        pred[ran] = settle(main.take(ran), read_extension(extension_logits[ran], policy)).pred
    gone = exits == Exit.CLOUD
    pred[gone] = cloud_pred[gone]
    return Routed(exits, pred)
