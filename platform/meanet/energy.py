"""Device and link profiles -> joules and seconds per exit. Pure; every number stands with its source."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.config import EnergyConfig
from meanet.errors import UserError


@dataclass(frozen=True)
class DeviceProfile:
    """What an edge device pays to compute."""

    name: str
    """The profile's name."""
    joules_per_mac: float
    """Joules per multiply-accumulate."""
    source: str
    """Where the number comes from."""


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
    source: str
    """Where the numbers come from."""

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


_HUANG = "Huang et al., MobiSys 2012; without the radio's promotion and tail"
DEVICES = {
    profile.name: profile
    for profile in (
        DeviceProfile("horowitz_45nm", 4.6e-12, "Horowitz, ISSCC 2014: fp32 multiply 3.7 pJ + add 0.9 pJ, arithmetic"),
    )
}
LINKS = {
    profile.name: profile
    for profile in (
        LinkProfile("wifi", 18.88, 283.17, 132.86, _HUANG),
        LinkProfile("lte", 5.85, 438.39, 1288.04, _HUANG),
        LinkProfile("3g", 1.1, 868.98, 817.88, _HUANG),
    )
}


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
class CostModel:
    """Joules of each exit on one device and link; the cloud's own energy is not the edge's and is not counted."""

    device: DeviceProfile
    """Edge device."""
    link: LinkProfile
    """Uplink."""
    macs: Macs
    """Of the networks."""

    @property
    def tag(self) -> str:
        """What stands beside each number: modelled, and by which profiles."""
        return f"modelled:{self.device.name}+{self.link.name}"

    @property
    def main_joules(self) -> float:
        """Compute of the main block, J per image."""
        return self.macs.main * self.device.joules_per_mac

    @property
    def extension_joules(self) -> float:
        """Further compute where adaptive and extension blocks run, J per image."""
        return (self.macs.adaptive + self.macs.extension) * self.device.joules_per_mac

    @property
    def main_seconds(self) -> float:
        """Time of the main block, s per image."""
        return 0.0

    @property
    def extension_seconds(self) -> float:
        """Further time where adaptive and extension blocks run, s per image."""
        return 0.0

    def cloud_seconds(self, num_bytes: NDArray[Any] | float) -> NDArray[np.float64]:
        """Time to the cloud's answer, s."""
        return np.asarray(num_bytes, dtype=np.float64) * self.link.seconds(1)

    def upload_joules(self, num_bytes: NDArray[Any] | float) -> NDArray[np.float64]:
        """Energy to send each of these payloads, J; bytes truly sent."""
        return np.asarray(num_bytes, dtype=np.float64) * self.link.joules_per_byte


def cost_model(config: EnergyConfig, macs: Macs) -> CostModel:
    """The profiles that a config names.

    Raises:
        UserError: there is no such profile; the message lists those that exist.
    """
    if config.device not in DEVICES:
        raise UserError(f"unknown device profile {config.device!r}: choose one of {', '.join(DEVICES)}")
    if config.link not in LINKS:
        raise UserError(f"unknown link profile {config.link!r}: choose one of {', '.join(LINKS)}")
    return CostModel(DEVICES[config.device], LINKS[config.link], macs)
