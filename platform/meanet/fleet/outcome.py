"""What a simulation comes to: latency, joules, replicas, cost, who answered. Pure arrays."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.fleet.model import Fleet
from meanet.fleet.workload import Workload
from meanet.routing import Bools, Exit, Floats, Ints

_PERCENTILES = (50, 90, 99)


class Status(IntEnum):
    """What became of an image."""

    MAIN = Exit.MAIN
    EXTENSION = Exit.EXTENSION
    CLOUD = Exit.CLOUD
    DEGRADED = 3
    """The edge answered though the cloud was wanted."""
    REFUSED = 4
    """No answer: the edge replica could not have given one before the deadline."""


@dataclass(frozen=True)
class Images:
    """M images, or a sample of them with weights."""

    rows: Ints
    """(M,) which recorded sample each is."""
    seconds: Floats
    """(M,) from arrival to answer; NaN where refused."""
    status: NDArray[np.int8]
    """(M,) `Status`."""
    sent: Bools
    """(M,) whether it was uploaded."""
    weight: Floats
    """(M,) how many images each stands for."""

    @staticmethod
    def join(parts: Sequence["Images"]) -> "Images":
        """All of them."""
        return Images(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Moment:
    """An interval of the simulation."""

    start_s: float
    """From the beginning."""
    seconds: float
    """How long it is."""
    images_per_second: float
    """Of all devices."""
    replicas: int
    """That answer, at its end."""
    paid: int
    """That cost, at its end: those that answer or start."""
    utilisation: float
    """Of the replicas, 0..1."""
    offered: float
    """What expected calls would take of the most replicas there may be, if all were made; above 1 these cannot keep
    up."""


@dataclass(frozen=True)
class Price:
    """What a replica costs."""

    per_replica_hour: float = 0.1
    """In `unit`; an example, to be replaced by what you pay."""
    unit: str = "USD (an example, no quotation)"
    """Currency, and where the price comes from."""


@dataclass(frozen=True)
class Outcome:
    """One fleet, simulated."""

    devices: int
    """N."""
    mode: str
    """exact or aggregated."""
    images: float
    """That came."""
    latency: dict[str, float]
    """Percentiles over answers, s."""
    latency_cloud: dict[str, float]
    """Percentiles over images that want the cloud, s; empty where there are none."""
    share: dict[str, float]
    """By `Status`, 0..1."""
    accuracy: float
    """Of the answers, 0..1."""
    joules: dict[str, float]
    """edge_compute and upload, J an image."""
    joules_device_hour: float
    """J, a device's idle power included."""
    joules_source: str
    """`modelled:<profiles>`."""
    replicas_mean: float
    """That are paid."""
    replicas_max: int
    """That are paid."""
    utilisation: float
    """Of the replicas, on average."""
    offered_max: float
    """The highest of the intervals; above 1 the cloud cannot keep up however it scales."""
    replica_hours: float
    """Paid."""
    cost: float
    """Of them."""
    cost_unit: str
    """Its unit."""
    timeline: tuple[Moment, ...]
    """Interval by interval."""

    @property
    def degraded(self) -> float:
        """Share of the images."""
        return self.share["degraded"]

    def to_dict(self, moments: int = 200) -> dict[str, Any]:
        """For JSON; of a long timeline, so many moments, evenly spread."""
        step = max(1, -(-len(self.timeline) // moments))
        return {**asdict(self), "timeline": [asdict(moment) for moment in self.timeline[::step]]}


def outcome(
    fleet: Fleet, work: Workload, images: Images, timeline: Sequence[Moment], *, mode: str, price: Price
) -> Outcome:
    """Sum up."""
    weight, status = images.weight, images.status
    total = float(weight.sum())
    share = {kind.name.lower(): float(weight[status == kind].sum()) / total if total else 0.0 for kind in Status}
    answered = status != Status.REFUSED
    drawn = work.take(images.rows)
    degraded = status == Status.DEGRADED
    right = np.where(degraded, drawn.right_alone, drawn.right)
    upload = np.where(images.sent, drawn.upload_joules, 0.0)
    joules = drawn.joules(images.sent, degraded)
    compute, sending = (_mean(values, weight, answered) for values in (joules - upload, upload))
    hours = sum(moment.seconds for moment in timeline) / 3600
    paid = sum(moment.paid * moment.seconds for moment in timeline) / 3600
    busy = sum(moment.utilisation * moment.replicas * moment.seconds for moment in timeline)
    have = sum(moment.replicas * moment.seconds for moment in timeline)
    return Outcome(
        devices=fleet.devices,
        mode=mode,
        images=total,
        latency=percentiles(images.seconds, weight, answered),
        latency_cloud=percentiles(images.seconds, weight, answered & drawn.gone),
        share=share,
        accuracy=_mean(right, weight, answered),
        joules={"edge_compute": compute, "upload": sending},
        joules_device_hour=(compute + sending) * total / fleet.devices / hours + 3600 * fleet.idle_watts,
        joules_source=work.source,
        replicas_mean=paid / hours,
        replicas_max=max(moment.paid for moment in timeline),
        utilisation=busy / have if have else 0.0,
        offered_max=max(moment.offered for moment in timeline),
        replica_hours=paid,
        cost=paid * price.per_replica_hour,
        cost_unit=price.unit,
        timeline=tuple(timeline),
    )


def percentiles(values: Floats, weight: Floats, which: Bools) -> dict[str, float]:
    """p50, p90 and p99 of the values that are meant; empty where there are none."""
    if not which.any():
        return {}
    order = np.argsort(values[which])
    ordered, sums = values[which][order], np.cumsum(weight[which][order])
    places = np.searchsorted(sums, np.array(_PERCENTILES) / 100 * sums[-1])
    return {f"p{name}": float(ordered[place]) for name, place in zip(_PERCENTILES, places, strict=True)}


def _mean(values: NDArray[Any], weight: Floats, which: Bools) -> float:
    return float(np.average(values[which], weights=weight[which])) if which.any() else 0.0
