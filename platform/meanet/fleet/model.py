"""What a fleet is: arrivals, times, limits, replicas. Plain values, checked; seconds unless said otherwise. Pure."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from meanet.errors import UserError
from meanet.routing import Floats


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_numbers(part: Any, where: str, *, above_0: tuple[str, ...] = ()) -> None:
    """Every number is finite and 0 or more; those named are above 0."""
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        positive = item.name in above_0
        good = math.isfinite(value) and (value > 0 if positive else value >= 0)
        wanted = "above 0" if positive else "0 or more"
        _require(good, f"{where}.{item.name} is {value}: it must be a number {wanted}")


FLAT = (1.0,) * 24
"""No hour is busier than another."""


@dataclass(frozen=True)
class Arrivals:
    """When images come: at random (Poisson), each device by itself, at a rate that follows the hour and the bursts."""

    rate: float = 0.1
    """Images a second of a device, on average over the hours and without bursts."""
    hours: tuple[float, ...] = FLAT
    """How busy each hour of the day is in its middle, from midnight on; only their ratios count."""
    bursts_per_day: float = 0.0
    """How often something makes all devices busy at once, at random."""
    burst_factor: float = 5.0
    """By how much."""
    burst_s: float = 60.0
    """How long."""

    def __post_init__(self) -> None:
        _check_numbers(self, "arrivals", above_0=("rate", "burst_factor", "burst_s"))
        _require(len(self.hours) == 24, f"arrivals.hours has {len(self.hours)} numbers: give 24, one an hour")
        good = all(math.isfinite(hour) and hour >= 0 for hour in self.hours) and sum(self.hours) > 0
        _require(good, f"arrivals.hours {self.hours}: they must be 0 or more, and not all 0")


@dataclass(frozen=True)
class EdgeTimes:
    """What an edge replica takes: one core, which takes all that waits when it is free, `max_batch` images at most."""

    main_s: float
    """Main block, an image."""
    extension_s: float = 0.0
    """Adaptive and extension block, an image on which they run."""
    batch_s: float = 0.0
    """Of each batch, whatever its size."""
    front_s: float = 0.0
    """Before and after, without holding the core: HTTP, the network to the client; the median."""
    front_spread: float = 0.0
    """How much that varies from image to image: the standard deviation of its logarithm (log-normal)."""
    max_batch: int = 64
    """Images of a batch at most."""

    def __post_init__(self) -> None:
        _check_numbers(self, "edge", above_0=("main_s", "max_batch"))

    def service(self, images: int, extended: int) -> float:
        """Seconds of the core for a batch of so many images, so many of them with the extension block."""
        return self.batch_s + self.main_s * images + self.extension_s * extended

    def fronts(self, count: int, generator: np.random.Generator) -> Floats:
        """(count,) what so many images wait before and after, s."""
        return np.asarray(self.front_s * np.exp(self.front_spread * generator.standard_normal(count)))


@dataclass(frozen=True)
class CloudTimes:
    """What a cloud replica takes for a call of n images: call_s + image_s * n, one call after another."""

    image_s: float
    """An image."""
    call_s: float = 0.0
    """A call, whatever its size."""
    network_s: float = 0.0
    """There and back, beside the link's own upload and round trip: serialising, routing."""

    def __post_init__(self) -> None:
        _check_numbers(self, "cloud", above_0=("image_s",))

    def service(self, images: float) -> float:
        """Seconds of a replica for a call of so many images."""
        return self.call_s + self.image_s * images


@dataclass(frozen=True)
class Autoscaling:
    """Ray Serve's rule, with Ray Serve's names and defaults (2.60)."""

    min_replicas: int = 1
    """At least."""
    max_replicas: int = 100
    """At most."""
    target_ongoing_requests: float = 2.0
    """Calls that wait or run, per replica."""
    upscale_delay_s: float = 30.0
    """For how long more must be wanted."""
    downscale_delay_s: float = 600.0
    """For how long fewer must be wanted."""
    look_back_period_s: float = 30.0
    """Over how long ongoing calls are averaged."""
    interval_s: float = 10.0
    """How often the rule is applied (Ray's controller: ten times a second, on metrics pushed every ten seconds)."""
    startup_s: float = 10.0
    """From the decision to the first answer of a new replica."""

    def __post_init__(self) -> None:
        _check_numbers(self, "scaling", above_0=("target_ongoing_requests", "look_back_period_s", "interval_s"))
        low, high = self.min_replicas, self.max_replicas
        _require(low >= 1, f"scaling.min_replicas is {low}: it must be 1 or more")
        _require(high >= low, f"scaling.max_replicas is {high}: it must be min_replicas ({low}) or more")


@dataclass(frozen=True)
class Limits:
    """What the server keeps to; the names are those of `serve_apps.settings`, where they are explained."""

    deadline_s: float = 2.0
    """Of a request."""
    cloud_budget_s: float = 0.5
    """For the cloud's answer, the upload included."""
    reserve_s: float = 0.05
    """Of the deadline, kept for the edge's own answer."""
    max_queued: int = 512
    """Images that may wait for an edge replica."""
    max_cloud_calls: int = 8
    """Of an edge replica, at a time."""
    breaker_failures: int = 3
    """In a row, that open an edge replica's breaker."""
    breaker_open_s: float = 1.0
    """Before a probe."""

    def __post_init__(self) -> None:
        above_0 = ("deadline_s", "cloud_budget_s", "breaker_open_s", "max_queued", "max_cloud_calls")
        _check_numbers(self, "limits", above_0=(*above_0, "breaker_failures"))
        _require(
            self.reserve_s < self.deadline_s,
            f"limits.reserve_s is {self.reserve_s}: it must be below deadline_s ({self.deadline_s})",
        )


@dataclass(frozen=True)
class Link:
    """From a device to the cloud."""

    bytes_per_second: float
    """Of an upload."""
    rtt_seconds: float = 0.0
    """Round trip."""

    def __post_init__(self) -> None:
        _check_numbers(self, "link", above_0=("bytes_per_second",))

    def seconds(self, num_bytes: float) -> float:
        """An upload and the way back of a short answer."""
        return num_bytes / self.bytes_per_second + self.rtt_seconds


@dataclass(frozen=True)
class Fleet:
    """N devices and a cloud."""

    devices: int
    """N, each with a source of images and joules of its own."""
    edge: EdgeTimes
    """Of an edge replica."""
    cloud: CloudTimes
    """Of a cloud replica."""
    link: Link
    """Of an edge replica."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    """Of a device."""
    scaling: Autoscaling = field(default_factory=Autoscaling)
    """Of the cloud."""
    limits: Limits = field(default_factory=Limits)
    """Of an edge replica."""
    sources_per_edge: int = 1
    """Devices that share an edge replica: 1 where each has its own, more at a gateway."""
    horizon_s: float = 3600.0
    """How long is simulated, from `start_hour` on."""
    start_hour: float = 0.0
    """Time of day at the beginning, 0..24."""
    warm: bool = True
    """True: the cloud begins with the replicas that the first load wants; False: with the fewest."""
    idle_watts: float = 0.0
    """What a device draws whatever it does, W."""

    def __post_init__(self) -> None:
        _check_numbers(self, "fleet", above_0=("devices", "sources_per_edge", "horizon_s"))
        _require(self.start_hour < 24, f"fleet.start_hour is {self.start_hour}: it must be below 24")

    @property
    def edges(self) -> int:
        """Edge replicas."""
        return -(-self.devices // self.sources_per_edge)

    @property
    def sources(self) -> list[int]:
        """Devices of each edge replica."""
        full, rest = divmod(self.devices, self.sources_per_edge)
        return [self.sources_per_edge] * full + ([rest] if rest else [])
