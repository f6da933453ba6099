"""How images reach the training loop: in whole batches, already on the device.

Shape letters: N images, B batch, C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ResidentFeed:
    """Images kept on the device as they will be used; shuffled, cropped and flipped there in whole batches."""

    images: Tensor
    """(N, C, H, W), normalised."""
    crop_padding: int
    flip: bool

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The augmented images of `index`, (B, C, H, W)."""
        images = self.images[index]
        if self.crop_padding:
            images = self._crop(images, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        padded = F.pad(images, [self.crop_padding] * 4)
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=generator)
        rows = (offsets[0, :, None] + torch.arange(height))[:, None, :, None]
        columns = (offsets[1, :, None] + torch.arange(width))[:, None, None, :]
        samples = torch.arange(count)[:, None, None, None]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        return padded[samples, channels, rows, columns]
