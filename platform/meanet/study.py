"""A search over recipes: what may vary, what a trial left, and how fronts of accuracy and joules are compared.

A trial is named by its parameters, so that the same configuration is one trial, however often a study is interrupted.

Shape letters: P points of a front. Pure numpy: no torch, no Ray.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.config import Recipe
from meanet.errors import UserError
from meanet.fronts import hypervolume
from meanet.storage import write_text

Value = str | int | float | bool
Params = dict[str, Value]
"""One value for each parameter of a space."""
_ROUNDING = 1e-9
"""Joules this close, as a share, are equal: a sum has been taken in another order."""
TRIAL = "trial.json"
"""A trial's folder that has it is whole."""


@dataclass(frozen=True)
class Choice:
    """One of some values, in no order."""

    values: tuple[Value, ...]
    """At least one."""

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError("a choice needs one value or more: give the space some")

    def holds(self, value: Value) -> bool:
        """Whether it is one of the values."""
        return value in self.values


@dataclass(frozen=True)
class IntRange:
    """A whole number."""

    low: int
    """Smallest."""
    high: int
    """Largest, included."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"a range from {self.low} to {self.high} holds no number: give it low <= high")

    def holds(self, value: Value) -> bool:
        """Whether it lies within."""
        return isinstance(value, int) and self.low <= value <= self.high


@dataclass(frozen=True)
class FloatRange:
    """A real number."""

    low: float
    """Smallest."""
    high: float
    """Largest, included."""
    log: bool = False
    """Whether factors matter, not differences."""

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(f"a range from {self.low} to {self.high}: give it low < high, and above 0 where log is set")

    def holds(self, value: Value) -> bool:
        """Whether it lies within."""
        return isinstance(value, int | float) and self.low <= value <= self.high


Domain = Choice | IntRange | FloatRange


def set_fields(recipe: Recipe, params: Mapping[str, Value]) -> Recipe:
    """The recipe with dotted fields replaced: `{"extension.epochs": 3}`."""
    sections: dict[str, dict[str, Value]] = {}
    for name, value in params.items():
        section, _, field_name = name.partition(".")
        sections.setdefault(section, {})[field_name] = value
    changed: dict[str, Any] = {
        name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()
    }
    return dataclasses.replace(recipe, **changed)


@dataclass(frozen=True)
class Space:
    """What may vary."""

    name: str
    """Of the function in tune_spaces."""
    parameters: Mapping[str, Domain]
    """Dotted field of the recipe, or a key that `apply` understands -> its values."""
    first: tuple[Params, ...]
    """Configurations that are tried before any other; the first of them is the default."""
    apply: Callable[[Recipe, Params], Recipe] = set_fields
    """(the study's recipe, parameters) -> the trial's recipe."""

    def __post_init__(self) -> None:
        for params in self.first:
            wrong = [name for name in {*self.parameters, *params} if not self._holds(name, params)]
            assert not wrong, f"space {self.name}: {wrong} of {params} are not in its parameters' domains"

    def _holds(self, name: str, params: Params) -> bool:
        return name in self.parameters and name in params and self.parameters[name].holds(params[name])


def trial_id(params: Params) -> str:
    """10 hex digits of the parameters: the trial's name."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]


# Fronts


@dataclass(frozen=True)
class Reference:
    """The corner from which fronts are measured: the same for every trial of a study."""

    accuracy: float
    """Of the default's main block alone, on validation, 0..1."""
    joules: float
    """Of the main block and an upload of every image, J per image."""

    def areas(self, accuracy: NDArray[np.float64], joules: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P,) what each point alone dominates, as a share of all that could be: 1 = right always, for nothing."""
        gain = np.maximum(accuracy - self.accuracy, 0.0) / max(1e-12, 1 - self.accuracy)
        saved: NDArray[np.float64] = np.maximum(self.joules - joules, 0.0) / self.joules
        return gain * saved

    def hypervolume(self, accuracy: NDArray[np.float64], joules: NDArray[np.float64]) -> float:
        """What P points dominate together, as the same share."""
        return hypervolume(accuracy, joules, min(self.accuracy, 1 - 1e-12), self.joules)


@dataclass(frozen=True)
class FrontPoint:
    """One operating point of a trial, on validation."""

    accuracy: float
    """0..1."""
    joules: float
    """J per image."""
    cloud_share: float
    """0..1."""
    gate: str
    """What is compared with thresholds."""
    thresholds: tuple[float | None, ...]
    """None = never to the cloud; left out of a policy with one a class, whose trial has it."""
    scaled: bool
    """Whether logits are divided by fitted temperatures."""
    num_hard_classes: int
    """k in use."""


@dataclass(frozen=True)
class Measured:
    """What is reported of a front: objectives for the searcher and the scheduler."""

    accuracy: float
    """Of the point that alone dominates the largest area."""
    joules: float
    """Of the same point."""
    hypervolume: float
    """Of the whole front, 0..1."""


def measure(front: Sequence[FrontPoint], reference: Reference) -> Measured:
    """A front's hypervolume and its one best point: the most accurate where none is better than the reference."""
    accuracy = np.array([point.accuracy for point in front])
    joules = np.array([point.joules for point in front])
    areas = reference.areas(accuracy, joules)
    best = int(np.argmax(areas if areas.max() > 0 else accuracy))
    return Measured(float(accuracy[best]), float(joules[best]), reference.hypervolume(accuracy, joules))


# What trials leave


@dataclass(frozen=True)
class Trial:
    """The content of trial.json."""

    id: str
    params: Params
    state: str
    """finished, or stopped by the scheduler."""
    measured: Measured
    """Of the last front."""
    front: tuple[FrontPoint, ...]
    """On validation; that of the last rung where it was stopped."""
    hard_classes: tuple[int, ...] = ()
    """All H, hardest first."""
    operating_point: dict[str, Any] | None = None
    """What the recipe's constraint chooses on validation; None where stopped, and where nothing keeps it."""
    phases: dict[str, str] = field(default_factory=dict)
    """Phase -> key in the study's store."""
    trained: tuple[str, ...] = ()
    """Phases that this trial trained itself."""
    seconds: float = 0.0
    """Wall time."""
    ended: float = 0.0
    """When, seconds since the epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Trial":
        """The inverse of `to_dict`.

        Raises:
            UserError: a field is missing or unknown.
        """
        try:
            return Trial(
                **{
                    **plain,
                    "measured": Measured(**plain["measured"]),
                    "front": tuple(_point(point) for point in plain["front"]),
                    "hard_classes": tuple(plain["hard_classes"]),
                    "trained": tuple(plain["trained"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"a trial's record cannot be read ({error}): remove its folder to run it again") from error


def _point(plain: Mapping[str, Any]) -> FrontPoint:
    return FrontPoint(**{**plain, "thresholds": tuple(plain["thresholds"])})


def write_front(front: Sequence[FrontPoint], path: Path) -> None:
    """A front by itself."""
    write_text(json.dumps([asdict(point) for point in front]), path)


def read_front(path: Path) -> tuple[FrontPoint, ...]:
    """What `write_front` wrote; nothing where it did not."""
    try:
        return tuple(_point(point) for point in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def write_trial(trial: Trial, folder: Path) -> None:
    """trial.json of a folder."""
    write_text(json.dumps(trial.to_dict(), indent=1), folder / TRIAL)


def read_trial(folder: Path) -> Trial | None:
    """The trial of a folder, if it is over.

    Raises:
        UserError: its record is damaged.
    """
    try:
        return Trial.from_dict(json.loads((folder / TRIAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / TRIAL} cannot be read ({error}): remove {folder} to run the trial again") from error


def read_trials(folder: Path) -> list[Trial]:
    """The trials that are over, in the order in which they ended."""
    found = [read_trial(path) for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    return sorted((trial for trial in found if trial), key=lambda trial: (trial.ended, trial.id))


def read_started(folder: Path) -> list[Params]:
    """Configurations of the trials that have said in this folder that they run, the longest ago first."""
    events: list[dict[str, Any]] = []
    for path in folder.glob("*.jsonl"):
        first, _, _ = path.read_text(encoding="utf-8").partition("\n")
        if first.endswith("}"):
            events.append(json.loads(first))
    return [event["params"] for event in sorted(events, key=lambda event: (event["at"], event["trial"]))]


@dataclass(frozen=True)
class UnionPoint:
    """A point of the union front."""

    trial: str
    """Id."""
    point: FrontPoint
    """Its figures on validation."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, flat."""
        return {"trial": self.trial, **asdict(self.point)}


def union_front(trials: Iterable[Trial]) -> list[UnionPoint]:
    """The points of all finished trials that no other one beats in accuracy and joules, cheapest first."""
    points = [UnionPoint(trial.id, point) for trial in trials if trial.state == "finished" for point in trial.front]
    front: list[UnionPoint] = []
    for candidate in sorted(points, key=lambda one: (one.point.joules, -one.point.accuracy)):
        if not front or candidate.point.accuracy > front[-1].point.accuracy:
            front.append(candidate)
    return front


def hypervolumes(trials: Iterable[Trial], reference: Reference) -> list[float]:
    """Of the union front after each trial, in order."""
    seen: list[Trial] = []
    values = []
    for trial in trials:
        seen.append(trial)
        front = [one.point for one in union_front(seen)]
        values.append(measure(front, reference).hypervolume if front else 0.0)
    return values


@dataclass(frozen=True)
class Gain:
    """What one front has over another."""

    accuracy: float
    """Largest gain in accuracy at equal joules, 0..1; 0 or less = nowhere above."""
    at_joules: float
    """Where, J per image; NaN if nowhere comparable."""
    joules_share: float
    """Largest share of joules that is saved at equal accuracy, 0..1."""

    @property
    def dominates(self) -> bool:
        """Whether it is better somewhere."""
        return self.accuracy > 1e-12


def gain(ours: Sequence[FrontPoint], theirs: Sequence[FrontPoint]) -> Gain:
    """What `ours` has over `theirs`: at the joules where either has a point and both can be afforded."""
    best = Gain(-math.inf, math.nan, 0.0)
    for joules in sorted({point.joules for point in (*ours, *theirs)}):
        above, below = _within(ours, joules), _within(theirs, joules)
        if above is not None and below is not None and above - below > best.accuracy:
            best = Gain(above - below, joules, 0.0)
    saved = 0.0
    for point in theirs:
        cheaper = min((one.joules for one in ours if one.accuracy >= point.accuracy), default=math.inf)
        saved = max(saved, 1 - cheaper / point.joules if point.joules > 0 else 0.0)
    return dataclasses.replace(best, joules_share=saved)


def _within(front: Sequence[FrontPoint], joules: float) -> float | None:
    """The best accuracy that those joules buy."""
    return max((point.accuracy for point in front if point.joules <= joules * (1 + _ROUNDING)), default=None)
