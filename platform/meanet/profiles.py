"""What a device pays to compute and a link to send: profiles, whatever they were read from. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from meanet.errors import UserError


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image in each block."""

    main: int
    """Main block."""
    adaptive: int
    """Adaptive block."""
    extension: int
    """Extension block."""
    cloud: int
    """Cloud network."""


@dataclass(frozen=True)
class BytesMoved:
    """Bytes between memory and arithmetic for one image in each of the edge's blocks (fp32, batch 1)."""

    main: int
    """Main block."""
    adaptive: int
    """Adaptive block."""
    extension: int
    """Extension block."""


@dataclass(frozen=True)
class Blocks:
    """A number of each of the edge's blocks, an image."""

    main: float
    """Main block."""
    adaptive: float
    """Adaptive block."""
    extension: float
    """Extension block."""


@dataclass(frozen=True)
class PerMacDevice:
    """A device that pays by the work: each multiply-accumulate, and each byte moved."""

    name: str
    """The profile's name."""
    joules_per_mac: float
    """Joules per multiply-accumulate."""
    joules_per_byte: float = 0.0
    """Joules per byte moved; 0 = arithmetic alone."""
    macs_per_second: float | None = None
    """Speed, for latency; None = not known."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its number comes from."""

    def joules(self, macs: Macs, moved: BytesMoved | None) -> Blocks:
        """Of each block, J per image.

        Raises:
            UserError: the device pays for bytes moved and these are not known.
        """
        if self.joules_per_byte and moved is None:
            raise UserError(
                f"device {self.name!r} costs joules per byte moved, which this exits table or model does not tell: "
                "evaluate again, or choose a device without"
            )
        moved = moved or BytesMoved(0, 0, 0)
        return Blocks(
            macs.main * self.joules_per_mac + moved.main * self.joules_per_byte,
            macs.adaptive * self.joules_per_mac + moved.adaptive * self.joules_per_byte,
            macs.extension * self.joules_per_mac + moved.extension * self.joules_per_byte,
        )

    def block_seconds(self, macs: Macs) -> Blocks | None:
        """Of each block, s per image; None where the speed is not known."""
        if self.macs_per_second is None:
            return None
        speed = self.macs_per_second
        return Blocks(macs.main / speed, macs.adaptive / speed, macs.extension / speed)


@dataclass(frozen=True)
class TimedDevice:
    """A device whose power and whose time for each block of one model were measured: joules = watts x seconds."""

    name: str
    """The profile's name."""
    watts: float
    """Power while computing."""
    seconds: Blocks
    """Of each block, s per image."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its number comes from."""

    def joules(self, macs: Macs, moved: BytesMoved | None) -> Blocks:
        """Of each block, J per image; by the clock, whatever the MACs."""
        seconds = self.seconds
        return Blocks(self.watts * seconds.main, self.watts * seconds.adaptive, self.watts * seconds.extension)

    def block_seconds(self, macs: Macs) -> Blocks:
        """Of each block, s per image."""
        return self.seconds


DeviceProfile = PerMacDevice | TimedDevice
"""What an edge device pays to compute."""


@dataclass(frozen=True)
class LinkProfile:
    """What an upload costs: power = alpha * throughput + beta (Huang et al., MobiSys 2012)."""

    name: str
    """The profile's name."""
    upload_mbps: float
    """Throughput, megabits per second."""
    alpha_mw_per_mbps: float
    """Power per throughput while sending, mW/Mbps."""
    beta_mw: float
    """Base power of the active radio, mW."""
    isolated_joules: float | None = None
    """One packet on its own, with the radio's promotion and tail, J; None = not known."""
    tail_seconds: float | None = None
    """How long the radio stays up after a packet, s; None = not known."""
    rtt_seconds: float = 0.0
    """Round trip to the cloud, s, for latency."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its number comes from."""

    @property
    def watts(self) -> float:
        """Power while sending."""
        return (self.alpha_mw_per_mbps * self.upload_mbps + self.beta_mw) / 1000

    def seconds(self, num_bytes: float) -> float:
        """Time to send that many bytes."""
        return num_bytes * 8 / (self.upload_mbps * 1e6)

    @property
    def joules_per_byte(self) -> float:
        """Energy to send one byte."""
        return self.watts * self.seconds(1)


@dataclass(frozen=True)
class Profiles:
    """All that may be named."""

    devices: Mapping[str, DeviceProfile]
    """By name."""
    links: Mapping[str, LinkProfile]
    """By name."""

    def device(self, name: str) -> DeviceProfile:
        """One device.

        Raises:
            UserError: there is no such profile; the message lists those that exist.
        """
        return _named("device", name, self.devices)

    def link(self, name: str) -> LinkProfile:
        """One link.

        Raises:
            UserError: there is no such profile; the message lists those that exist.
        """
        return _named("link", name, self.links)


T = TypeVar("T")


def _named(what: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        remedy = f"choose one of {', '.join(known)}, or add it in a file given as energy.profiles"
        raise UserError(f"unknown {what} profile {name!r}: {remedy}")
    return known[name]
