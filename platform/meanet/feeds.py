"""How images reach the training loop: normalised, augmented, on the device, in whole batches.

Two feeds, one interface: `ResidentFeed` here, and `meanet.streaming.StreamingFeed`, which decodes through Ray Data.

Shape letters: N images, B batch, C channels, H height, W width.
"""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from meanet.config import DataConfig
from meanet.data import ImageTable
from meanet.preprocessing import Preprocessing

Batch = tuple[Tensor, Tensor]
"""Rows of the table (B,) and their images (B, C, H, W)."""


@dataclass(frozen=True)
class Share:
    """Which part of a phase's samples one of several workers trains on."""

    rank: int
    world_size: int
    per_worker: int
    """Samples a step."""


class Feed(Protocol):
    """Where a phase's images come from."""

    def steps(self, rows: Tensor, share: Share) -> int:
        """Steps of an epoch over these rows: the same for every worker."""

    def train(self, rows: Tensor, share: Share, seeds: tuple[int, int], steps: int) -> Iterator[Batch]:
        """So many steps of one worker's share of a shuffled, augmented pass.

        The two seeds order it and augment it, so that it can be repeated.
        """

    def evaluate(self, rows: Tensor, size: int) -> Iterator[Batch]:
        """Every one of these rows once, as it is."""


@dataclass(frozen=True)
class Scaling:
    """Bytes -> what a network takes, on its device."""

    preprocessing: Preprocessing
    device: torch.device
    channels_last: bool
    """Layout of the result."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, C) bytes -> (B, C, H, W) floats of mean 0 and deviation 1."""
        scale, shift = self._factors
        normal = (images.to(self.device, non_blocking=True) * scale - shift).permute(0, 3, 1, 2)
        return normal if self.channels_last else _channels_first(normal)

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """On the device once: to send them there each step would wait for it."""
        std = torch.tensor(self.preprocessing.std, device=self.device)
        return 1 / (255 * std), torch.tensor(self.preprocessing.mean, device=self.device) / std


@dataclass(frozen=True)
class Augmentation:
    """Random changes of whole batches, on their device."""

    config: DataConfig

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) -> the same shape and layout."""
        if self.config.min_crop_area < 1:
            images = _resized_crop(images, self.config.min_crop_area, generator)
        if self.config.crop_padding:
            images = _crop(images, self.config.crop_padding, generator)
        return self.flip(images, generator)

    def flip(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Flips alone: for images that were cropped as they were decoded."""
        if not self.config.flip:
            return images
        mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _channels_first(images: Tensor) -> Tensor:
    """A copy: of one-channel images `contiguous()` would keep strides that convolutions take for channels-last."""
    return images.clone(memory_format=torch.contiguous_format)


def _crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with the mean colour and cut out a part of the old size anywhere."""
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (B, H + 2p, W + 2p, C)
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator, device=device)
    rows = (offsets[0, :, None] + torch.arange(height, device=device))[:, :, None]
    columns = (offsets[1, :, None] + torch.arange(width, device=device))[:, None, :]
    samples = torch.arange(count, device=device)[:, None, None]
    cropped = padded[samples, rows, columns].permute(0, 3, 1, 2)
    assert cropped.shape[1] == channels, "channels stay"
    return _channels_first(cropped) if images.is_contiguous() else cropped


def _resized_crop(images: Tensor, min_area: float, generator: torch.Generator) -> Tensor:
    """Cut out `min_area` to 1 of the area, aspect 3:4 to 4:3, and scale it up (Szegedy et al., arXiv 1409.4842)."""
    count, device = len(images), images.device
    draws = torch.rand((4, count), generator=generator, device=device)
    area = min_area + (1 - min_area) * draws[0]
    aspect = torch.exp((2 * draws[1] - 1) * np.log(4 / 3))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros((count, 2, 3), device=device)
    theta[:, 0, 0], theta[:, 0, 2] = wide, (2 * draws[2] - 1) * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = high, (2 * draws[3] - 1) * (1 - high)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def from_numpy(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Tensor:
    """Share an array's memory, read-only arrays of Ray's object store too (nothing here writes to it)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class ResidentFeed:
    """Bytes kept on the device, shuffled, cropped and flipped there in whole batches; no process of its own."""

    def __init__(self, table: ImageTable, config: DataConfig, scaling: Scaling) -> None:
        self._images = from_numpy(table.images).to(scaling.device)
        self._scaling, self._augment = scaling, Augmentation(config)

    def steps(self, rows: Tensor, share: Share) -> int:
        """Steps of an epoch over these rows: the same for every worker."""
        return len(rows) // share.world_size // share.per_worker

    def train(self, rows: Tensor, share: Share, seeds: tuple[int, int], steps: int) -> Iterator[Batch]:
        """Every worker draws the same order and takes its slice of each step."""
        device = self._scaling.device
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seeds[0]))
        rows = rows[order].to(device)
        generator = torch.Generator(device).manual_seed(seeds[1] + share.rank)
        for step in range(steps):
            start = (step * share.world_size + share.rank) * share.per_worker
            part = rows[start : start + share.per_worker]
            yield part, self._augment(self._scaling(self._images[part]), generator)

    def evaluate(self, rows: Tensor, size: int) -> Iterator[Batch]:
        """Every one of these rows once, as it is."""
        for part in torch.split(rows.to(self._scaling.device), size):
            yield part, self._scaling(self._images[part])
