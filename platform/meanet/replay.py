"""Recorded exits, and what any policy makes of them: sample by sample through the one exit rule. No network runs.

Shape letters: N samples, C classes, H hard classes, k <= H of them in use. Pure arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meanet.energy import CostModel
from meanet.routing import Exit, Ints, Policy, Reading, Routed, read_extension, read_main, route_readings


@dataclass(frozen=True)
class Exits:
    """What every exit said of N samples of one split: all that a policy can be replayed from."""

    labels: Ints
    """(N,) true class ids."""
    main_logits: NDArray[np.float32]
    """(N, C)."""
    extension_logits: NDArray[np.float32]
    """(N, H), hardest class first."""
    cloud_pred: Ints
    """(N,) class ids."""
    upload_bytes: Ints
    """(N,) bytes that go to the cloud if the sample does."""
    hard_classes: tuple[int, ...]
    """H class ids, hardest first."""

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.main_logits.shape[1])


@dataclass(frozen=True)
class Outcome:
    """One policy over one split; figures are per image."""

    accuracy: float
    """0..1."""
    accuracy_hard_classes: float
    """0..1, of samples whose true class is hard."""
    share: dict[str, float]
    """By exit, 0..1."""
    macs_edge: float
    """Multiply-accumulates on the device."""
    bytes_uploaded: float
    """Bytes."""
    joules: dict[str, float]
    """edge_compute and upload, J."""
    joules_source: str
    """`modelled:<profiles>`."""
    disagreement: float = 0.0
    """0..1, of the samples that stay on the edge: how often the cloud would have answered otherwise."""
    seconds: float = 0.0
    """Expected latency: the device's compute, and the link and the cloud where the sample goes there."""

    @property
    def total_joules(self) -> float:
        """J per image; both parts carry the same tag."""
        return sum(self.joules.values())


class Replayer:
    """Replays many policies over the same exits, each reading computed once."""

    def __init__(self, exits: Exits, costs: CostModel) -> None:
        self.exits, self.costs = exits, costs
        self._main: Callable[[float], Reading] = lru_cache(maxsize=8)(self._read_main)
        self._extension: Callable[[int, float], Reading] = lru_cache(maxsize=64)(self._read_extension)

    def _read_main(self, temperature: float) -> Reading:
        return read_main(self.exits.main_logits, Policy(temperatures={"main": temperature, "extension": 1.0}))

    def _read_extension(self, size: int, temperature: float) -> Reading:
        temperatures = {"main": 1.0, "extension": temperature}
        policy = Policy(hard_classes=self.exits.hard_classes[:size], temperatures=temperatures)
        return read_extension(self.exits.extension_logits, policy)

    def route(self, policy: Policy) -> Routed:
        """Who answers each sample, and what."""
        policy.check_classes(self.exits.num_classes)
        size, temperatures = len(policy.hard_classes), policy.temperatures
        assert policy.hard_classes == self.exits.hard_classes[:size], "a policy uses the first of the trained classes"
        return route_readings(
            self._main(temperatures["main"]),
            lambda rows: self._extension(size, temperatures["extension"]).take(rows),
            self.exits.cloud_pred,
            policy,
        )

    def replay(self, policy: Policy) -> Outcome:
        """What the policy costs and yields."""
        return outcome(self.exits, self.costs, self.route(policy))


def replay(exits: Exits, costs: CostModel, policy: Policy) -> Outcome:
    """One policy over recorded exits, sample by sample through the one exit rule."""
    return Replayer(exits, costs).replay(policy)


def joules_of(exits: Exits, costs: CostModel, routed: Routed) -> NDArray[np.float64]:
    """(N,) joules of the device for each sample."""
    gone = routed.exit == Exit.CLOUD
    edge = costs.main_joules + routed.extended * costs.extension_joules
    return np.asarray(edge + np.where(gone, costs.upload_joules(exits.upload_bytes), 0.0), dtype=np.float64)


def outcome(exits: Exits, costs: CostModel, routed: Routed, *, main_runs: bool = True) -> Outcome:
    """What it costs and yields that these exits answered.

    Args:
        exits: recorded exits.
        costs: joules, seconds and MACs.
        routed: who answered each sample.
        main_runs: False for cloud-only, where the device computes nothing.
    """
    right = routed.pred == exits.labels
    hard = np.isin(exits.labels, exits.hard_classes)
    extended, gone = routed.extended.mean(), routed.exit == Exit.CLOUD
    macs = costs.macs.main * main_runs + extended * (costs.macs.adaptive + costs.macs.extension)
    seconds = costs.main_seconds * main_runs + extended * costs.extension_seconds
    return Outcome(
        accuracy=float(right.mean()),
        accuracy_hard_classes=float(right[hard].mean()) if hard.any() else float("nan"),
        share={exit_.label: float((routed.exit == exit_).mean()) for exit_ in Exit},
        macs_edge=float(macs),
        bytes_uploaded=float((gone * exits.upload_bytes).mean()),
        joules={
            "edge_compute": costs.compute_joules(main_runs=main_runs, extended_share=float(extended)),
            "upload": float((gone * costs.upload_joules(exits.upload_bytes)).mean()),
        },
        joules_source=costs.tag,
        disagreement=float((routed.pred != exits.cloud_pred)[~gone].mean()) if not gone.all() else 0.0,
        seconds=float(seconds + (gone * costs.cloud_seconds(exits.upload_bytes)).mean()),
    )
