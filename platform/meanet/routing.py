"""THE exit rule of MEANet (section V): who answers a sample. Evaluation, search and server all call this file.

A sample with softmax p of the main exit goes
1. to the **cloud** if it is complex: its complexity is above the threshold, and the cloud may be used;
2. else it is answered by the **main** exit if argmax(p) is an easy class;
3. else the **extension** block runs, and its answer stands unless the main exit is more confident.
A gate on the entropy of the accepted answer asks step 1 of samples of hard classes last: their extension block has run
by then, and is paid for.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use. Pure numpy: no torch, no Ray.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from meanet.config import Gate, Measure
from meanet.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
GATES: tuple[Gate, ...] = get_args(Gate)
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Complexities that a threshold is compared with; each is a gate of its own, too."""
_BLOCK = 1024
"""Rows that are read at a time: a hundred classes of them fit into a core's cache."""


class Exit(IntEnum):
    """Where inference ends. `EXTENSION` whenever that block ran, whichever of the two answers was kept."""

    MAIN = 0
    EXTENSION = 1
    CLOUD = 2

    @property
    def label(self) -> str:
        """The name in tables and answers: main, extension or cloud."""
        return self.name.lower()


_MAIN, _EXTENSION, _CLOUD = (np.int64(exit_) for exit_ in Exit)  # enums are slow to become arrays


@dataclass(frozen=True)
class Policy:
    """Everything that the rule depends on beside the logits."""

    gate: Gate = "main_entropy"
    """Which complexity is compared with which threshold."""
    thresholds: tuple[float | None, ...] = (None,)
    """Complexity above it is complex; None = never to the cloud. One for a gate that is a measure; two for `two_gate`
    (main predicts an easy class, a hard one); one a class that main predicts for `per_class`."""
    hard_classes: tuple[int, ...] = ()
    """Class ids, hardest first: the extension exit's k classes in use."""
    temperatures: dict[str, float] = field(default_factory=lambda: {"main": 1.0, "extension": 1.0})
    """Logits are divided by these before the softmax."""
    edge_only: bool = False
    """True: nothing may go to the cloud."""
    measures: tuple[Measure, ...] = ()
    """What `two_gate` compares (easy, hard) and `per_class` (one for all); main_entropy and accepted_entropy, and
    main_entropy, if not given. Other gates are their own measure."""

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise UserError(f"unknown gate {self.gate!r}: choose one of {', '.join(GATES)}")
        self._check_thresholds()
        if len(set(self.hard_classes)) != len(self.hard_classes) or any(c < 0 for c in self.hard_classes):
            raise UserError(f"hard_classes {self.hard_classes} must be distinct class ids of 0 or more")
        if sorted(self.temperatures) != ["extension", "main"] or min(self.temperatures.values()) <= 0:
            raise UserError(f"temperatures {self.temperatures} must give main and extension numbers above 0")
        if not self.measures:
            default: dict[str, tuple[Measure, ...]] = {
                "two_gate": ("main_entropy", "accepted_entropy"),
                "per_class": ("main_entropy",),
            }
            object.__setattr__(self, "measures", default.get(self.gate, (self.gate,)))
        count = 2 if self.gate == "two_gate" else 1
        if len(self.measures) != count or not set(self.measures) <= set(MEASURES):
            raise UserError(f"measures {list(self.measures)}: gate {self.gate} takes {count} of {', '.join(MEASURES)}")
        if self.gate in MEASURES and self.measures != (self.gate,):
            raise UserError(f"measures {list(self.measures)}: gate {self.gate} is its own measure; give none")

    def _check_thresholds(self) -> None:
        counts = {"two_gate": "two thresholds", "per_class": "a threshold a class"}
        wanted = counts.get(self.gate, "one threshold")
        given = len(self.thresholds)
        if not given or (self.gate != "per_class" and given != (2 if self.gate == "two_gate" else 1)):
            raise UserError(f"gate {self.gate} takes {wanted}, not {given}")
        for threshold in self.thresholds:
            if threshold is not None and not np.isfinite(threshold):
                raise UserError(f"threshold {threshold} is not a finite number: use null for never to the cloud")

    @property
    def threshold(self) -> float | None:
        """The single threshold of the gates that have one; of others, the first."""
        return self.thresholds[0]

    @cached_property  # asked of each image that a server answers
    def hard_table(self) -> Bools:
        """Whether a class is hard, by class id; the last entry stands for all further ids, which are easy."""
        table = np.zeros(max(self.hard_classes, default=-1) + 2, dtype=bool)
        table[list(self.hard_classes)] = True
        return table

    @cached_property
    def limits(self) -> Floats:
        """The thresholds as numbers; infinite = never to the cloud."""
        return np.array([np.inf if value is None or self.edge_only else value for value in self.thresholds])

    def check_classes(self, num_classes: int) -> None:
        """Check what only the number of classes C can tell.

        Raises:
            UserError: `per_class` has not C thresholds; a hard class is none of 0..C-1.
        """
        if self.gate == "per_class" and len(self.thresholds) != num_classes:
            raise UserError(
                f"gate per_class has {len(self.thresholds)} thresholds for {num_classes} classes: give one a class"
            )
        wrong = [class_id for class_id in self.hard_classes if class_id >= num_classes]
        if wrong:
            raise UserError(f"hard_classes {wrong} are none of the {num_classes} classes 0..{num_classes - 1}")

    @property
    def uses_cloud(self) -> bool:
        """Whether any sample could go to the cloud."""
        return not self.edge_only and any(threshold is not None for threshold in self.thresholds)

    def with_request(self, *, edge_only: bool = False, threshold: float | None = None) -> "Policy":
        """This policy under a request's own wishes; the stricter `edge_only` wins."""
        if threshold is not None and len(self.thresholds) > 1:
            raise UserError(
                f"threshold {threshold}: the policy in force, gate {self.gate}, has {len(self.thresholds)} of them; "
                "leave it out"
            )
        thresholds = self.thresholds if threshold is None else (float(threshold),)
        return replace(self, edge_only=self.edge_only or edge_only, thresholds=thresholds)

    def to_dict(self) -> dict[str, Any]:
        """The fields of an operating point that the rule reads."""
        measures = {} if self.gate in MEASURES else {"measures": list(self.measures)}
        return {
            "gate": self.gate,
            "thresholds": list(self.thresholds),
            "hard_classes": list(self.hard_classes),
            "temperatures": dict(self.temperatures),
            **measures,
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
                measures=tuple(plain.get("measures", ())),
            )
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"an operating point cannot be read: {type(error).__name__} {error}") from error


def policy_id(policy: Policy) -> str:
    """8 hex digits of the policy's content: the same policy has the same id everywhere."""
    return hashlib.sha256(json.dumps(policy.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


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
    if len(logits) > _BLOCK:
        blocks = [read(logits[row : row + _BLOCK], temperature, classes) for row in range(0, len(logits), _BLOCK)]
        return Reading(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in vars(blocks[0])})
    shifted: Floats = np.array(logits, dtype=np.float64)
    if temperature != 1.0:
        shifted /= temperature
    with np.errstate(invalid="ignore", over="ignore"):
        finite: Bools = np.isfinite(shifted.sum(axis=1))
    sound = bool(finite.all())
    if not sound:
        shifted[~finite] = 0.0
    column = np.argmax(shifted, axis=1)
    rows = np.arange(len(column))
    shifted -= shifted[rows, column][:, None]
    exponent = np.exp(shifted)
    total = exponent.sum(axis=1)
    entropy = np.log(total) - np.einsum("ij,ij->i", exponent, shifted) / total
    confidence = 1.0 / total  # the largest exponential is 1
    exponent[rows, column] = 0.0
    margin = confidence - exponent.max(axis=1) / total
    entropy = np.maximum(entropy, 0.0)
    pred = column if classes is None else np.asarray(classes, dtype=np.int64)[column]
    if not sound:
        confidence, margin = np.where(finite, confidence, 0.0), np.where(finite, margin, 0.0)
        entropy = np.where(finite, entropy, np.inf)
    return Reading(pred, confidence, entropy, margin)


def read_main(logits: NDArray[np.floating[Any]], policy: Policy) -> Reading:
    """The main exit's reading, (N, C) logits."""
    return read(logits, policy.temperatures["main"])


def read_extension(logits: NDArray[np.floating[Any]], policy: Policy) -> Reading:
    """The extension exit's reading: (N, H) logits, hardest class first, of which the policy's k are kept."""
    count = len(policy.hard_classes)
    return read(logits[:, :count], policy.temperatures["extension"], policy.hard_classes)


def complexity(reading: Reading, measure: Measure) -> Floats:
    """(N,) how complex a sample is: higher = further from certain; infinite where the logits are not finite.

    Of the main exit's reading; for `accepted_entropy`, of the answer that the edge accepts.
    """
    if measure in ("main_entropy", "accepted_entropy"):
        return reading.entropy
    certainty = reading.confidence if measure == "max_softmax" else reading.margin
    uncertain: Floats = np.where(np.isinf(reading.entropy), np.inf, 1.0 - certainty)
    return uncertain


def is_hard(main: Reading, policy: Policy) -> Bools:
    """(N,) step 2: whether the main exit predicts a hard class."""
    table = policy.hard_table
    found: Bools = table[np.minimum(main.pred, len(table) - 1)]
    return found


def limits(main: Reading, hard: Bools, policy: Policy) -> Floats:
    """(N,) the threshold that holds for each sample, (1,) where one holds for all; infinite = never to the cloud."""
    values = policy.limits
    if policy.gate == "per_class":
        values = values[main.pred]
    elif policy.gate == "two_gate":
        values = values[hard.astype(np.int64)]
    return values


def waits(policy: Policy) -> bool:
    """Whether samples of hard classes are judged only by the answer that the edge accepts."""
    return policy.measures[-1] == "accepted_entropy"


def first_exit(main: Reading, policy: Policy) -> Ints:
    """(N,) steps 1 and 2: the `Exit` at which each sample ends, as far as it is known when only the main block ran.

    Where the accepted answer's entropy decides, samples of hard classes run the extension block first: `still_complex`.
    """
    hard = is_hard(main, policy)
    own = limits(main, hard, policy)
    leaves = complexity(main, policy.measures[0]) > own
    if policy.gate == "two_gate":
        leaves = np.where(hard, complexity(main, policy.measures[1]) > own, leaves)
    if waits(policy):  # but for those of which the main exit says nothing
        leaves = np.where(hard, np.isinf(main.entropy) & np.isfinite(own), leaves)
    return np.where(leaves, _CLOUD, np.where(hard, _EXTENSION, _MAIN))


def still_complex(main: Reading, settled: Reading, policy: Policy) -> Bools:
    """(N,) of samples whose extension block ran: whether the accepted answer sends them to the cloud all the same."""
    if not waits(policy):
        return np.zeros(len(main.pred), dtype=bool)
    return complexity(settled, "accepted_entropy") > limits(main, np.ones(len(main.pred), dtype=bool), policy)


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
    extended: Bools
    """(N,) whether the extension block ran, whoever answered in the end."""


def route(
    main_logits: NDArray[np.floating[Any]],
    extension_logits: NDArray[np.floating[Any]],
    cloud_pred: Ints,
    policy: Policy,
) -> Routed:
    """Replay the rule over recorded exits: (N, C) and (N, H) logits and (N,) cloud answers."""
    policy.check_classes(main_logits.shape[1])
    main = read_main(main_logits, policy)
    return route_readings(main, lambda rows: read_extension(extension_logits[rows], policy), cloud_pred, policy)


def route_readings(main: Reading, read_rows: Callable[[Ints], Reading], cloud_pred: Ints, policy: Policy) -> Routed:
    """The rule over what the exits were read to say.

    Args:
        main: of N samples.
        read_rows: the extension exit's reading of these rows, asked for once and only where that block runs.
        cloud_pred: (N,) the cloud's answers.
        policy: what to apply.
    """
    exits = first_exit(main, policy)
    pred = main.pred.copy()
    ran = np.flatnonzero(exits == Exit.EXTENSION)
    extended = np.zeros(len(pred), dtype=bool)
    if len(ran):
        own = main.take(ran)
        settled = settle(own, read_rows(ran))
        pred[ran], extended[ran] = settled.pred, True
        exits[ran[still_complex(own, settled, policy)]] = Exit.CLOUD
    gone = exits == Exit.CLOUD
    pred[gone] = cloud_pred[gone]
    return Routed(exits, pred, extended)
