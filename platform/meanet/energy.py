"""What an exit costs on one device and link: joules and seconds, each with where it comes from. Pure.

The profiles themselves stand in profiles.yaml, read by `meanet.profile_files`.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.config import EnergyConfig, Tail
from meanet.errors import UserError
from meanet.profile_files import available
from meanet.profiles import Blocks, BytesMoved, DeviceProfile, LinkProfile, Macs, Profiles

__all__ = [
    "BytesMoved",
    "CostModel",
    "DeviceProfile",
    "Energy",
    "ImageJoules",
    "LinkProfile",
    "Macs",
    "cost_model",
    "tail_joules",
]


@dataclass(frozen=True)
class Energy:
    """Joules and where they come from: `measured:<meter>` or `modelled:<profiles>`. Two sources never add up."""

    joules: float
    """J."""
    source: str
    """The tag."""

    def __add__(self, other: "Energy") -> "Energy":
        if self.source != other.source:
            raise UserError(
                f"{self.joules:g} J ({self.source}) and {other.joules:g} J ({other.source}) have no sum, for their "
                "sources differ: report them side by side"
            )
        return Energy(self.joules + other.joules, self.source)

    @staticmethod
    def total(parts: Iterable["Energy"]) -> "Energy":
        """The sum of one or more parts of one source.

        Raises:
            UserError: their sources differ.
        """
        return functools.reduce(lambda one, other: one + other, parts)


@dataclass(frozen=True)
class ImageJoules:
    """What an image costs one device on one link, J: the numbers alone, for where no profiles are read."""

    main: float
    """Main block."""
    extension: float
    """Further compute where adaptive and extension block run."""
    upload_byte: float
    """A byte that is sent."""
    upload: float
    """An upload, beside its bytes."""
    source: str
    """`modelled:<profiles>`."""

    def of(self, *, extended: bool, num_bytes: int | None) -> dict[str, Any]:
        """Of one image, as answers have it: edge_compute and upload, J, and their source.

        Args:
            extended: whether adaptive and extension block ran.
            num_bytes: that were sent; None = there was no upload.
        """
        upload = 0.0 if num_bytes is None else self.upload + self.upload_byte * num_bytes
        return {"edge_compute": self.main + self.extension * extended, "upload": upload, "source": self.source}


@dataclass(frozen=True)
class CostModel:
    """Joules and seconds of each exit on one device and link; the cloud's own energy is not the edge's: not counted."""

    device: DeviceProfile
    """Edge device."""
    link: LinkProfile
    """Uplink."""
    macs: Macs
    """Of the networks."""
    bytes_moved: BytesMoved | None = None
    """Of the edge's blocks; None = not known."""
    tail: Tail = "none"
    """How the radio's promotion and tail are counted."""
    uploads_per_second: float = 1.0
    """Rate of uploads, which share tails if `amortised`."""
    cloud_compute_seconds: float = 0.0
    """What the cloud takes for an image, s."""

    @property
    def tag(self) -> str:
        """What stands beside each number of joules: modelled, and by which profiles."""
        tail = {"none": "", "isolated": "+isolated", "amortised": f"+amortised@{self.uploads_per_second:g}/s"}
        return f"modelled:{self.device.name}+{self.link.name}{tail[self.tail]}"

    @functools.cached_property  # each answer of a server asks for it
    def block_joules(self) -> Blocks:
        """Compute of each block, J per image."""
        return self.device.joules(self.macs, self.bytes_moved)

    @property
    def main_joules(self) -> float:
        """Compute of the main block, J per image."""
        return self.block_joules.main

    @property
    def extension_joules(self) -> float:
        """Further compute where adaptive and extension blocks run, J per image."""
        joules = self.block_joules
        return joules.adaptive + joules.extension

    def compute_joules(self, *, main_runs: bool, extended_share: float) -> float:
        """Compute of a policy, J per image.

        Args:
            main_runs: False where the device computes nothing (cloud-only).
            extended_share: of the images, 0..1, on which adaptive and extension blocks run.
        """
        return self.main_joules * main_runs + extended_share * self.extension_joules

    def upload_joules(self, num_bytes: NDArray[Any] | float) -> NDArray[np.float64]:
        """Energy to send each of these payloads, J; bytes truly sent, and the tail as the config counts it."""
        sending = np.asarray(num_bytes, dtype=np.float64) * self.link.joules_per_byte
        return sending + tail_joules(self.link, self.tail, self.uploads_per_second)

    @property
    def image_joules(self) -> ImageJoules:
        """The numbers alone."""
        tail = tail_joules(self.link, self.tail, self.uploads_per_second)
        return ImageJoules(self.main_joules, self.extension_joules, self.link.joules_per_byte, tail, self.tag)

    @property
    def main_seconds(self) -> float:
        """Time of the main block, s per image; 0 where the device's speed is not known."""
        seconds = self.device.block_seconds(self.macs)
        return seconds.main if seconds else 0.0

    @property
    def extension_seconds(self) -> float:
        """Further time where adaptive and extension blocks run, s per image; 0 where the speed is not known."""
        seconds = self.device.block_seconds(self.macs)
        return seconds.adaptive + seconds.extension if seconds else 0.0

    def cloud_seconds(self, num_bytes: NDArray[Any] | float) -> NDArray[np.float64]:
        """Further time where an image goes to the cloud, s: upload, round trip and the cloud's own."""
        return self.upload_seconds(num_bytes) + self.cloud_compute_seconds

    def upload_seconds(self, num_bytes: NDArray[Any] | float) -> NDArray[np.float64]:
        """Time of each of these payloads on its way, and of the answer's back, s: bytes over the link's rate, and its
        round trip."""
        return np.asarray(num_bytes, dtype=np.float64) * self.link.seconds(1) + self.link.rtt_seconds

    @property
    def latency_source(self) -> str:
        """What stands beside each number of seconds."""
        if self.device.block_seconds(self.macs) is None:
            return f"modelled:{self.link.name} without compute"
        return f"modelled:{self.device.name}+{self.link.name}"


def tail_joules(link: LinkProfile, tail: Tail, uploads_per_second: float) -> float:
    """What an upload costs beside its bytes: the radio's promotion and tail, J.

    isolated: each upload finds the radio asleep and pays the whole tail. amortised: uploads arrive at random (Poisson)
    at that rate r, and one within the tail T of another starts it anew; the radio stays up for min(T, time to the next
    upload), on average (1 - exp(-r T)) / r, of which the share of a whole tail is (1 - exp(-r T)) / (r T).

    Raises:
        UserError: the link's profile does not have these figures.
    """
    if tail == "none":
        return 0.0
    wanted = {"isolated_joules": link.isolated_joules}
    if tail == "amortised":
        wanted["tail_seconds"] = link.tail_seconds
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise UserError(
            f"link {link.name!r} has no {' and no '.join(missing)}, which energy.tail {tail!r} needs: choose "
            "energy.tail none, another link, or a profile of your own"
        )
    isolated, seconds = link.isolated_joules or 0.0, link.tail_seconds or 0.0
    if tail == "isolated":
        return isolated
    tails = uploads_per_second * seconds
    return isolated * (-math.expm1(-tails) / tails if tails > 0 else 1.0)


def cost_model(
    config: EnergyConfig, macs: Macs, bytes_moved: BytesMoved | None = None, profiles: Profiles | None = None
) -> CostModel:
    """What a config's device and link cost.

    Args:
        config: names of profiles, and how to count.
        macs: of the networks.
        bytes_moved: of the edge's blocks; None = not known.
        profiles: to choose from; the built-in ones and the config's own if not given.

    Raises:
        UserError: there is no such profile (the message lists those that exist), or it lacks what the config asks for.
    """
    known = profiles or available(config.profiles)
    costs = CostModel(
        known.device(config.device),
        known.link(config.link),
        macs,
        bytes_moved,
        config.tail,
        config.uploads_per_second,
        config.cloud_seconds,
    )
    _ = costs.main_joules, costs.upload_joules(0)  # what a profile lacks shows here, before anything is computed
    return costs
